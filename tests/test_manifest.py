"""A manifest is read back as written, and every way it can be broken is refused with a telling message."""

import json
from pathlib import Path

import pytest

from daco.errors import FormatError, FormatTooNewError, IntegrityError
from daco.manifest import canonical_json, check_files, file_entry, read_manifest, validate, write_manifest


def good(folder: Path) -> dict:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "a.parquet").write_bytes(b"PAR1 not really")
    entry = file_entry(folder / "data" / "a.parquet", rows=3)
    return {
        "format_version": "1.0.0",
        "kind": "dataset",
        "name": "toy",
        "version": "1.2.3",
        "files": {"data/a.parquet": entry},
        "configs": {
            "stimuli": {"splits": {"train": {"files": ["data/a.parquet"], "rows": 3}}, "columns": ["x"]}
        },
        "models": {},
        "sources": [],
        "counts": {},
        "recipe": {},
        "seeds": {},
        "versions": {},
        "facts": {},
    }


def test_round_trip_and_reproducible_bytes(tmp_path: Path) -> None:
    manifest = good(tmp_path)
    write_manifest(tmp_path, manifest)
    first = (tmp_path / "manifest.json").read_bytes()
    write_manifest(tmp_path, dict(reversed(manifest.items())))
    assert (tmp_path / "manifest.json").read_bytes() == first
    assert read_manifest(tmp_path) == manifest
    check_files(tmp_path, manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "zip"}, "expected 'dataset' or 'model', got 'zip'"),
        ({"version": "v1"}, "expected MAJOR.MINOR.PATCH, got 'v1'"),
        ({"sources": {}}, "sources: expected list, got dict"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"files": {"../a": {"sha256": "0" * 64, "bytes": 1}}}, "'../a' is not a plain relative path"),
        ({"files": {"/a": {"sha256": "0" * 64, "bytes": 1}}}, "'/a' is not a plain relative path"),
        ({"files": {"a": {"sha256": "xyz", "bytes": 1}}}, "expected a sha256 of 64 hex digits"),
        ({"files": {"a": {"sha256": "0" * 64, "bytes": -1}}}, "expected a size in bytes, got -1"),
        ({"configs": {"c": {"splits": {"a-b": {"files": [], "rows": 0}}}}}, "split 'a-b'"),
        (
            {"configs": {"c": {"splits": {"a": {"files": ["x"], "rows": 0}}}}},
            "names 'x', which is not among the files",
        ),
        ({"configs": {"c": {"splits": {"a": {"files": ["data/a.parquet"], "rows": 4}}}}}, "expected 4 rows"),
    ],
)
def test_a_broken_rule_is_named(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        validate(good(tmp_path) | change)
    assert message in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    manifest = good(tmp_path)
    del manifest["seeds"]
    with pytest.raises(FormatError, match="expected key 'seeds', got none"):
        validate(manifest)


def test_a_newer_major_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FormatTooNewError, match="pip install --upgrade daco"):
        validate(good(tmp_path) | {"format_version": "2.0.0"})
    validate(good(tmp_path) | {"format_version": "1.9.0"})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_truncated_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(IntegrityError, match="expected JSON"):
        read_manifest(tmp_path)


def test_a_release_without_manifest_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="the release is incomplete"):
        read_manifest(tmp_path)


def test_nothing_is_written_when_the_manifest_is_broken(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        write_manifest(tmp_path, good(tmp_path) | {"kind": "zip"})
    assert not (tmp_path / "manifest.json").exists()


def test_truncated_altered_missing_and_stray_files_are_found(tmp_path: Path) -> None:
    manifest = good(tmp_path)
    file = tmp_path / "data" / "a.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match="truncated"):
        check_files(tmp_path, manifest)
    file.write_bytes(whole[:-1] + b"?")
    with pytest.raises(IntegrityError, match="altered"):
        check_files(tmp_path, manifest)
    file.unlink()
    with pytest.raises(IntegrityError, match="got none"):
        check_files(tmp_path, manifest)
    file.write_bytes(whole)
    (tmp_path / "stray.txt").write_text("x")
    with pytest.raises(IntegrityError, match=r"stray\.txt"):
        check_files(tmp_path, manifest)


def test_canonical_json_refuses_nan_and_keeps_unicode() -> None:
    assert canonical_json({"b": "é", "a": 1}) == '{\n  "a": 1,\n  "b": "é"\n}\n'
    assert json.loads(canonical_json({"x": 0.1}))["x"] == 0.1
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": float("nan")})
