import os
import pickle
import shutil
import sys

import pytest
from torchvision.datasets import ImageFolder

from mokd_fast.data.sources import EXTENSIONS, open_source
from mokd_fast.errors import UserError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_flat_folder(tmp_path):
    root = touch(tmp_path / "p", "b.PNG", "a.jpg", "c.JpEg", "notes.txt", ".hidden.png")
    source = open_source(root)
    assert names(source) == [str(root / n) for n in ("a.jpg", "b.PNG", "c.JpEg")]
    assert [source.read(i) for i in range(3)] == [b"a.jpg", b"b.PNG", b"c.JpEg"]
    assert source.classes == () and source.label(0) == -1


def test_every_extension_is_found(tmp_path):
    touch(tmp_path, *(f"x{e}" for e in EXTENSIONS), *(f"y{e.upper()}" for e in EXTENSIONS))
    assert len(open_source(str(tmp_path))) == 2 * len(EXTENSIONS)


def test_imagefolder_gives_the_same_list(tmp_path):
    touch(tmp_path, "dog/2.png", "dog/1.png", "cat/9.jpg", "ant-b/0.png", "ant/0.png", "ant/x.txt")
    source, theirs = open_source(tmp_path), ImageFolder(str(tmp_path))
    assert list(source.classes) == theirs.classes == ["ant", "ant-b", "cat", "dog"]
    ours = [(source.name(i), source.label(i)) for i in range(len(source))]
    assert ours == theirs.samples


def test_nested_classes_and_a_stray_picture(tmp_path):
    touch(tmp_path, "a/x/1.png", "a/2.png", "b/y/z/3.png", ".cache/4.png")
    source = open_source(tmp_path)
    assert source.classes == ("a", "b")
    assert [source.label(i) for i in range(3)] == [0, 0, 1]
    touch(tmp_path, "stray.png")
    stray = open_source(tmp_path)
    assert stray.classes == () and {stray.label(i) for i in range(4)} == {-1}


def test_odd_names(tmp_path):
    odd = ["ä ö.png", "new\nline.png", "#x.png"]
    if sys.platform == "linux":
        odd.append(os.fsdecode(b"latin-\xe4.png"))
    for name in odd:
        (tmp_path / name).write_bytes(os.fsencode(name))
    source = open_source(tmp_path)
    assert sorted(names(source)) == sorted(str(tmp_path / n) for n in odd)
    for i in range(len(source)):
        assert source.read(i) == os.fsencode(os.path.basename(source.name(i)))


def test_links_are_followed_but_not_in_circles(tmp_path):
    real = touch(tmp_path / "real", "1.png")
    root = touch(tmp_path / "root", "a/2.png")
    (root / "linked").symlink_to(real)
    (root / "a" / "up").symlink_to(root)
    (root / "dead").symlink_to(tmp_path / "nowhere")
    (root / "dead.png").symlink_to(tmp_path / "nowhere.png")
    found = [os.path.relpath(n, root) for n in names(open_source(root))]
    assert found == ["a/2.png", "dead.png", "linked/1.png"]  # dead.png: a bad file, not a crash


def test_folders_that_are_linked_to_each_other(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png", "c/3.png")
    (tmp_path / "a" / "to_b").symlink_to("../b")
    (tmp_path / "b" / "to_c").symlink_to("../c")
    (tmp_path / "c" / "to_a").symlink_to("../a")
    found = [os.path.relpath(n, tmp_path / "a") for n in names(open_source(tmp_path / "a"))]
    assert found == ["1.png", "to_b/2.png", "to_b/to_c/3.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no name here")
def test_a_pipe_is_no_picture(tmp_path, alarm):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    source = open_source(touch(tmp_path, "c.png"))
    for i in range(2):
        with pytest.raises(OSError, match="a pipe or a device"):
            source.read(i)
    assert source.read(2) == b"c.png"


def test_the_fingerprint_is_of_the_list(tmp_path):
    one = touch(tmp_path / "one", "a/1.png", "a/2.png")
    prints = [open_source(one).fingerprint()]
    shutil.copytree(one, tmp_path / "two")
    assert open_source(tmp_path / "two").fingerprint() == prints[0]
    touch(one, "a/3.png")
    prints.append(open_source(one).fingerprint())
    (one / "a/3.png").rename(one / "a/4.png")
    prints.append(open_source(one).fingerprint())
    assert len(set(prints)) == 3


def test_a_source_can_be_sent_to_a_worker(tmp_path):
    source = open_source(touch(tmp_path, "a/1.png", "b/2.png"))
    copy = pickle.loads(pickle.dumps(source))
    assert names(copy) == names(source) and copy.classes == source.classes and copy.label(1) == 1


def test_list(tmp_path):
    touch(tmp_path, "p/1.png", "p/2 b.weird", "far/3.png")
    (tmp_path / "p" / "list.TXT").write_text(
        f"\ufeff# pictures\n2 b.weird\r\n\n  1.png  \n{tmp_path}/far/3.png\n1.png\n", "utf-8"
    )
    source = open_source(tmp_path / "p" / "list.TXT")
    assert [source.read(i) for i in range(4)] == [b"p/2 b.weird", b"p/1.png", b"far/3.png",
                                                  b"p/1.png"]  # fmt: skip
    assert source.classes == () and source.label(0) == -1


def test_list_with_missing_files(tmp_path):
    lines = ["there.png", *(f"gone{i}.png" for i in range(5))]
    (touch(tmp_path, "there.png") / "l.txt").write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "l.txt")
    assert "5 of 6 files do not exist: gone0.png, gone1.png, gone2.png, …" in str(error.value)
    assert f"Relative paths start at {tmp_path}" in str(error.value)


def test_list_that_names_nothing(tmp_path):
    (tmp_path / "l.txt").write_text("# nothing\n\n")
    with pytest.raises(UserError, match="names no file; expected one path a line"):
        open_source(tmp_path / "l.txt")


def test_another_kind_of_file(tmp_path):
    with pytest.raises(UserError, match=r"a\.jpg: is a file; expected a folder or a \.txt list"):
        open_source(touch(tmp_path, "a.jpg") / "a.jpg")


def test_missing(tmp_path):
    with pytest.raises(UserError, match=r"no such folder.*fashion-mnist, digits"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match="fashion-mnist/valid: no such folder"):
        open_source("fashion-mnist/valid")


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="the folder is empty; expected pictures in it or below"):
        open_source(tmp_path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        open_source(tmp_path)


def test_folder_without_pictures(tmp_path):
    touch(tmp_path, "a.txt", "b.txt", "s/c.csv", "README")
    with pytest.raises(UserError) as error:
        open_source(tmp_path)
    text = str(error.value)
    assert "Looked for .jpg .jpeg .png" in text and "found 4 other files: 2 x .txt" in text
    assert "1 x .csv" in text and "1 x no extension" in text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_no_permission(tmp_path):
    touch(tmp_path, "a/1.png", "l.txt")
    (tmp_path / "a").chmod(0)
    (tmp_path / "l.txt").chmod(0)
    try:
        with pytest.raises(UserError, match="a: cannot list this folder: Permission denied"):
            open_source(tmp_path)
        with pytest.raises(UserError, match="cannot read this list: Permission denied"):
            open_source(tmp_path / "l.txt")
    finally:
        (tmp_path / "a").chmod(0o700)


def test_home_and_a_folder_that_is_called_like_a_built_in(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "digits/1.png")
    assert len(open_source("~/digits")) == 1
    monkeypatch.chdir(tmp_path)
    assert len(open_source("digits")) == 1
    assert not cache.exists()
