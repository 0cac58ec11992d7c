"""Files and folders of results are replaced whole or not at all."""
import os

import pytest

from runtime.files import atomic_run_folder, replacing


def test_a_file_is_replaced_whole_or_not_at_all(E, tmp_path):
    path = tmp_path / "deep" / "file"
    with replacing(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), replacing(path) as partial:
        partial.write_text("sec")
        raise OSError("full")
    assert path.read_text() == "first" and os.listdir(path.parent) == ["file"]


def publish(E, out_dir, text):
    with atomic_run_folder(out_dir, E.HERE) as partial:
        (partial / "final_info.json").write_text(text)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_publishing_replaces_and_keeps(E, tmp_path):
    out_dir = tmp_path / "deep" / "run_1"
    publish(E, out_dir, "first")
    (out_dir / "human_ratings.json").write_text("ratings")
    publish(E, out_dir, "second")
    assert (out_dir / "final_info.json").read_text() == "second"
    assert (out_dir / "human_ratings.json").read_text() == "ratings"
    with pytest.raises(ZeroDivisionError), atomic_run_folder(out_dir, E.HERE) as partial:
        (partial / "final_info.json").write_text("third")
        1 / 0
    assert (out_dir / "final_info.json").read_text() == "second"
    assert listing(out_dir.parent) == ["run_1"]


@pytest.mark.parametrize("left", [
    {"run_1": "first", "run_1.partial": "second"},               # killed before the old folder moves away
    {"run_1.replaced": "first", "run_1.partial": "second"},      # between the two renames
    {"run_1": "second", "run_1.replaced": "first"},              # before the old folder is deleted
    {"run_1": "first", "run_1.partial": "second", "run_1.replaced": "older"},
], ids=lambda left: " ".join(left))
@pytest.mark.parametrize("fails", [False, True])
def test_a_kill_while_publishing_loses_nothing(E, tmp_path, left, fails):
    for name, text in left.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "final_info.json").write_text(text)
        (tmp_path / name / "human_ratings.json").write_text("ratings")
    completed = left.get("run_1") or left["run_1.replaced"]
    if fails:
        with pytest.raises(ZeroDivisionError), atomic_run_folder(tmp_path / "run_1", E.HERE):
            1 / 0
    else:
        publish(E, tmp_path / "run_1", "third")
    assert (tmp_path / "run_1" / "final_info.json").read_text() == (completed if fails else "third")
    assert (tmp_path / "run_1" / "human_ratings.json").read_text() == "ratings"
    assert fails or listing(tmp_path) == ["run_1"]
