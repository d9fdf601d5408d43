# Installs medmoe_jax where it is not there yet: a wheel in this folder, else from the repository.
import glob
import importlib.util
import subprocess
import sys

REPOSITORY = ""

if importlib.util.find_spec("medmoe_jax") is None:
    wheels = sorted(glob.glob("medmoe_jax-*.whl"))
    package = wheels[-1] if wheels else f"medmoe_jax @ git+{REPOSITORY}"
    if not (wheels or REPOSITORY):
        raise FileNotFoundError("medmoe_jax-*.whl: upload the package's wheel into this folder")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)
