import pytest

from configs import ConfigError
from configs.cli import main


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
    print((overrides, data_format, resume, num, temperature, dry, prefix))
    return 3 if num == 96 else None


def call(capsys, *argv):
    with pytest.raises(SystemExit) as exit_:
        main(command, list(argv), name="prog")
    captured = capsys.readouterr()
    return exit_.value.code, captured.out.strip(), captured.err.strip()


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], ((), None, False, 3, 0.0, False, "")),
        (
            ["train.max_steps=20", "loss.name=focal", "data.path=a,b"],
            (
                ("train.max_steps=20", "loss.name=focal", "data.path=a,b"),
                None,
                False,
                3,
                0.0,
                False,
                "",
            ),
        ),
        (
            ["--resume", "a.b=1", "--dry", "c.d=[1,2]", "--num", "5"],
            (("a.b=1", "c.d=[1,2]"), None, True, 5, 0.0, True, ""),
        ),
        (
            ["--resume", "runs/x", "--temperature", "-1", "--nodry"],
            ((), None, "runs/x", 3, -1.0, False, ""),
        ),
        (
            ["--data-format=chat", "--prefix", "--- x = [1, '2'"],
            ((), "chat", False, 3, 0.0, False, "--- x = [1, '2'"),
        ),
        (["--prefix", "a.b=3"], ((), None, False, 3, 0.0, False, "a.b=3")),
        (["--prefix=-", "--data_format", "123"], ((), "123", False, 3, 0.0, False, "-")),
        (["a.b=--flag"], (("a.b=--flag",), None, False, 3, 0.0, False, "")),
    ],
)
def test_arguments_arrive_as_meant(capsys, argv, expected):
    assert call(capsys, *argv) == (0, repr(expected), "")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rezume"], "unknown flag --rezume; did you mean --resume?"),
        (["--zzz", "3"], "unknown flag --zzz (flags: --data_format"),
        (["--a.b=3"], "write overrides without dashes: a.b=3"),
        (["--num"], "--num needs a value"),
        (["--num", "--dry"], "--num needs a value"),
        (["--num", "x"], "--num=x: must be int"),
        (["--temperature", "hot"], "--temperature=hot: must be float"),
        (["--dry=maybe"], "--dry=maybe: must be bool"),
        (["--num", "99"], "two lines"),
    ],
)
def test_user_errors_are_one_line(capsys, argv, message):
    code, out, err = call(capsys, *argv)
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
        (based, ["--model", "x", "--num", "2"], "x 2"),
        (based, ["--model=x"], "x 0"),
        (based, ["--base", "x"], "x 0"),
        (targeted, ["--base", "x"], "x"),
        (both, ["--model", "x"], "None x"),
    ):
        with pytest.raises(SystemExit):
            main(fn, argv)
        assert capsys.readouterr().out.strip() == said
    with pytest.raises(SystemExit):
        main(based, ["--num", "--model", "x"])
    assert "--num needs a value" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(based, ["--help"])
    said = capsys.readouterr().out
    assert "--base" in said and "--model" not in said


def test_exit_codes(capsys):
    assert call(capsys, "--num", "98")[0] == 130
    assert call(capsys, "--num", "96")[0] == 3
    with pytest.raises(ValueError, match="a bug of ours"):
        main(command, ["--num", "97"])


def test_help(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0 and "Summary of the command." in out
    assert "--num INT (default: 3)" in out and "[section.key=value ...]" in out
