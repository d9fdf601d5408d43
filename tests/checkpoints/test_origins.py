"""Where a base comes from, by its files."""

from medmoe_jax.checkpoints.origins import Origin, origin_of
from tests import gguf_files


def test_what_a_gguf_file_tells(tmp_path):
    def more(writer):
        writer.add_license("apache-2.0")
        writer.add_languages(["en", "fr"])

    gguf_files.write(tmp_path / "told.gguf", more=more)
    gguf_files.write(tmp_path / "silent.gguf")
    told = Origin("told.gguf", licence={"license": "apache-2.0"}, languages=("en", "fr"))
    assert origin_of(str(tmp_path / "told.gguf"), None) == told
    assert origin_of(str(tmp_path / "silent.gguf"), None) == Origin("silent.gguf")


def test_the_id_on_the_hub(tmp_path):
    assert origin_of("hf://org/name@v1", tmp_path) == Origin("org/name", "org/name", "v1")
    assert origin_of(str(tmp_path), tmp_path) == Origin(tmp_path.name)
    (tmp_path / "LICENSE").write_text("terms")
    (tmp_path / "licensed.txt").write_text("something else")
    (tmp_path / "README.md").write_text("no front matter\n")
    found = origin_of(str(tmp_path), tmp_path)
    assert set(found.files) == {"LICENSE", "README.md"} and not found.licence
