# Installs medmoe_jax with the jax, jaxlib and plugin that fit this machine: from a wheel in this
# folder, else from the repository. Where it is there already nothing is done. What the session has
# loaded stays as it is, so that nothing asks for a restart.
import glob
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile

REPOSITORY = ""
PLUGINS = {
    "tpu": ("libtpu", "libtpu-nightly"),
    "cuda12": ("jax-cuda12-plugin", "jax-cuda12-pjrt"),
    "gpu": ("jax-cuda13-plugin", "jax-cuda13-pjrt"),
}


def accelerator():
    """The extra for this machine: `tpu`, `gpu` (CUDA 13), `cuda12`, or "" for the CPU."""
    told = {"TPU_ACCELERATOR_TYPE", "TPU_NAME", "COLAB_TPU_ADDR"} & set(os.environ)
    if told or glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return "tpu"
    if not glob.glob("/dev/nvidia[0-9]*"):
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        driver, capability = run(query).splitlines()[0].split(",")
    except (OSError, RuntimeError):
        return "cuda12"
    # CUDA 13 needs a driver from 580 on, and a GPU not older than Turing.
    return "gpu" if int(driver.split(".")[0]) >= 580 and float(capability) >= 7.5 else "cuda12"


def loaded():
    """`package==version` of all that this session has imported."""
    packages = importlib.metadata.packages_distributions()
    own = {name for name, module in sys.modules.items() if getattr(module, "__file__", None)}
    found = {package for name in own & set(packages) for package in packages[name]}
    return sorted(f"{package}=={importlib.metadata.version(package)}" for package in found)


def run(command):
    """What a command prints; RuntimeError with its last lines where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError("\n".join([" ".join(command), *done.stdout.splitlines()[-20:]]))
    return done.stdout


def install():
    """Bring medmoe_jax, and take away plugins that are not for this machine."""
    again = "choose Restart session, and run this cell before any other"
    if "jax" in sys.modules:
        raise RuntimeError(f"this session has imported jax, which is to be replaced: {again}")
    wheels = sorted(glob.glob("medmoe_jax-*.whl"))
    if not (wheels or REPOSITORY):
        raise FileNotFoundError("medmoe_jax-*.whl: upload the package's wheel into this folder")
    pip, extra = [sys.executable, "-m", "pip"], accelerator()
    there = {one.name.lower().replace("_", "-") for one in importlib.metadata.distributions()}
    others = [name for kind in set(PLUGINS) - {extra} for name in PLUGINS[kind] if name in there]
    if others:
        run([*pip, "uninstall", "--quiet", "--yes", *sorted(others)])
    whole = f"medmoe_jax[{extra}]" if extra else "medmoe_jax"
    source = f"file://{os.path.abspath(wheels[-1])}" if wheels else f"git+{REPOSITORY}"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as kept:
        kept.write("\n".join(loaded()))
        kept.flush()
        try:
            run([*pip, "install", "--quiet", "--constraint", kept.name, f"{whole} @ {source}"])
        except RuntimeError as error:
            raise RuntimeError(f"{error}\nIf it names what is loaded already: {again}") from None
    importlib.invalidate_caches()
    print("installed", whole)


if importlib.util.find_spec("medmoe_jax") is None:
    install()
