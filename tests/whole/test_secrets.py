"""The login's token reaches no stream and no file, whatever a server or a fault does with it."""

import os
import sys
import warnings
from pathlib import Path

import pytest

from lora_cli.app import main
from lora_cli.redaction import redacted
from tests.cli import lora
from tests.fake_hub import BASE, FakeHub, lora_files

TOKENS = {"usual": "hf_" + "cAnArY7" * 5, "of another form": "S3cret/not+of=the usual:form"}
COMMANDS = (
    ("pool", "sync", "--base", BASE),
    ("pool", "verify", "ann/sql{status}"),
    ("pool", "fetch", "ann/sql{status}"),
    ("merge", "ann/sql{status}", "-o", "out"),
    ("train", "--base", "acme/none", "--data", "task.jsonl", "-o", "trained"),
)


def written(*folders: Path) -> str:
    """All bytes of all files below `folders`."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and file.name != "token"]
    return "".join(file.read_bytes().decode("latin-1") for file in files)


def log_in(token: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "environment":
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        from huggingface_hub import constants

        file = Path(os.environ["HF_HOME"]) / "token"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(token)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(file))


@pytest.mark.parametrize("way", ["environment", "login"])
@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_a_server_that_echoes_the_login_cannot_make_it_public(
    token: str, way: str, fake: FakeHub, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_DEBUG", "1")
    log_in(token, way, monkeypatch)
    (own_home / "task.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    echo = f"Authorization: Bearer {token}\x1b[2J"
    fake.answer_headers = {"X-Error-Message": f"Bearer {token}", "X-Request-Id": token}
    told, codes = "", set()
    for status in (200, 400, 401, 403, 404, 500):
        fake.add(f"ann/sql{status}", lora_files())
        if status != 200:
            fake.fail("", times=1000, status=status, body=f'{{"error": "{echo}"}}'.encode())
        for words in COMMANDS:
            code, out, err = lora(*(word.format(status=status) for word in words))
            codes.add(int(code))
            told += out + err
        fake._faults.clear()
    assert codes >= {0, 3, 4, 7}
    assert any("authorization" in {name.lower() for name in asked.headers} for asked in fake.asked)
    assert "Traceback" in told
    assert token not in told
    assert "\x1b" not in told
    assert token not in written(own_home, Path(os.environ["HOME"]), Path(os.environ["HF_HOME"]))


def test_a_bug_shows_its_traceback_without_secrets_controls_or_values(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = TOKENS["of another form"]
    monkeypatch.setenv("HF_TOKEN", token)

    def fails(*_: object, **__: object) -> None:
        value_of_a_variable = token[::-1]
        warnings.simplefilter("default")
        warnings.warn(f"a library's remark on {token}\x1b[2J", stacklevel=1)
        sys.stderr.writelines([f"written by a library: {token}\n"])
        raise RuntimeError(f"{token}\x1b[2J\u202e {value_of_a_variable[:0]}")

    monkeypatch.setattr("lora_cli.catalogue.adapters.Catalogue.find", fails)
    monkeypatch.setattr(sys, "argv", ["lora", "pool", "list"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    told = "".join(capsys.readouterr())
    assert "Traceback" in told
    assert "RuntimeError: [redacted]\\x1b[2J\\u202e" in told
    assert "warning: UserWarning: a library's remark on [redacted]\\x1b[2J" in told
    assert "written by a library: [redacted]" in told
    assert token not in told
    assert token[::-1] not in told


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Bearer abc.def-1", "Authorization: Bearer [redacted]"),
        ('{"authorization": "Basic YWJjOmRlZg=="}', '{"authorization": "Basic [redacted]"}'),
        ("[(b'authorization', b'Bearer abcd')]", "[(b'authorization', b'Bearer [redacted]')]"),
        ("token hf_" + "a1" * 17 + ".", "token [redacted]."),
        ("bearer 0123456789abcdef0", "bearer [redacted]"),
        ("hf_hub, the bearer of news, authorization", "hf_hub, the bearer of news, authorization"),
        ("pool/o/authorization-helper", "pool/o/authorization-helper"),
        ("authorization denied: authorization/v2.1", "authorization denied: authorization/v2.1"),
    ],
)
def test_secrets_by_their_look(text: str, shown: str) -> None:
    assert redacted(text) == shown
