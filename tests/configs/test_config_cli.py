import ast
from pathlib import Path

import pytest
import yaml

from configs import ConfigError
from configs.cli import main

ARGUMENTS = yaml.safe_load((Path(__file__).parents[1] / "data/arguments.yaml").read_text("utf-8"))


def command(
    *overrides: str,
    data_format: str | None = None,
    resume: bool | str = False,
    num: int = 3,
    temperature: float = 0.0,
    dry: bool = False,
    prefix: str = "",
):
    """Summary of the command."""
    if num == 99:
        raise ConfigError("two\nlines")
    if num == 98:
        raise KeyboardInterrupt
    if num == 97:
        raise ValueError("a bug of ours")
    given = {k: v for k, v in locals().items() if v != command.__kwdefaults__.get(k, ())}
    print({k: list(v) if isinstance(v, tuple) else v for k, v in given.items()})
    return 3 if num == 96 else None


def call(capsys, *argv, fn=command):
    with pytest.raises(SystemExit) as exit_:
        main(fn, list(argv), name="prog")
    captured = capsys.readouterr()
    return exit_.value.code, captured.out.strip(), captured.err.strip()


@pytest.mark.parametrize("argv, expected", ARGUMENTS["arrive"].items())
def test_arguments_arrive_as_meant(capsys, argv, expected):
    code, out, err = call(capsys, *argv.split())
    assert (code, err) == (0, "") and ast.literal_eval(out) == expected


def test_a_text_may_begin_with_dashes(capsys):
    value = "--- x = [1, '2'"
    assert call(capsys, "--prefix", value)[1] == repr({"prefix": value})


@pytest.mark.parametrize("argv, message", ARGUMENTS["refused"].items())
def test_user_errors_are_one_line(capsys, argv, message):
    code, out, err = call(capsys, *argv.split())
    assert code == 1 and out == "" and err.startswith("error: ") and message in err
    assert "\n" not in err


def test_other_names_of_a_flag(capsys):
    def based(*, base: str | None = None, num: int = 0):
        print(base, num)

    def targeted(*, target: str | None = None):
        print(target)

    def both(*, base: str | None = None, model: str | None = None):
        print(base, model)

    for fn, argv, said in (
        (based, "--model x --num 2", "x 2"),
        (based, "--base x", "x 0"),
        (targeted, "--base x", "x"),
        (both, "--model x", "None x"),
    ):
        assert call(capsys, *argv.split(), fn=fn) == (0, said, "")


def test_a_flag_without_a_default_is_asked_for(capsys):
    def needs(*, data: str):
        print(data)

    assert call(capsys, fn=needs) == (1, "", "error: give --data VALUE")
    assert "--data STR" in call(capsys, "--help", fn=needs)[1]
    assert "unexpected argument 'x'" in call(capsys, "--data", "a", "x", fn=needs)[2]


def test_exit_codes_and_help(capsys):
    assert call(capsys, "--num", "98")[0] == 130
    assert call(capsys, "--num", "96")[0] == 3
    with pytest.raises(ValueError, match="a bug of ours"):
        main(command, ["--num", "97"])
    code, out, _ = call(capsys, "--help")
    assert code == 0 and "Summary of the command." in out
    assert "--num INT" in out and "(default: 3)" in out and "[section.key=value ...]" in out
