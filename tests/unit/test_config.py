from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import pytest

from app.config import ServeSettings, add_flags, cache_folder, resolve, variable_name
from app.errors import StorageError, UsageError


def test_each_source_wins_over_the_one_below_it(tmp_path: Path) -> None:
    file = tmp_path / "pestle.toml"
    file.write_text('port = 1001\nparallel = 2\nqueue = 3\nmodel_path = "from-file.gguf"\n')
    environment = {"LLM_PORT": "1002", "LLM_PARALLEL": "5", "LLM_CONFIG": str(file)}

    resolved = resolve({"port": "1003"}, environment)

    assert resolved.settings.port == 1003
    assert resolved.settings.parallel == 5
    assert resolved.settings.queue == 3
    assert resolved.settings.model_path == "from-file.gguf"
    assert resolved.settings.host == "127.0.0.1"
    picked = {name: resolved.origins[name] for name in ("port", "parallel", "queue", "host")}
    assert picked == {"port": "flag", "parallel": "environment", "queue": "file", "host": "default"}


@pytest.mark.parametrize(
    ("flags", "environment", "toml", "culprit"),
    [
        ({"port": "eighty"}, {}, "", "--port: 'eighty' is wrong, it takes an integer from 0 to 65535"),
        ({"port": "70000"}, {}, "", "--port"),
        ({"drain_timeout": "nan"}, {}, "", "--drain-timeout: 'nan' is wrong, it takes a number from 0 to 3600"),
        ({"device": "tpu"}, {}, "", "--device: 'tpu' is wrong, it takes auto, cpu, cuda or metal"),
        ({}, {"LLM_PARALLEL": "0"}, "", "LLM_PARALLEL"),
        ({}, {}, 'port = "8080"', "'port'"),
        ({}, {}, "host = 1", "'host': 1 is wrong, it takes a string"),
        ({}, {}, "prot = 8080", "'prot'"),
        ({}, {}, "port = = 1", "not valid TOML"),
    ],
)
def test_a_wrong_value_is_refused_and_its_place_named(
    tmp_path: Path, flags: dict[str, str], environment: dict[str, str], toml: str, culprit: str
) -> None:
    file = tmp_path / "pestle.toml"
    file.write_text(toml)
    with pytest.raises(UsageError, match=culprit):
        resolve(flags, environment, str(file))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(StorageError, match=r"nowhere\.toml"):
        resolve({}, {}, "nowhere.toml")


def test_every_setting_has_a_flag_whose_help_names_its_variable() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    for field in msgspec.structs.fields(ServeSettings):
        assert "--" + field.name.replace("_", "-") in text
        assert variable_name(field.name) in text.replace("\n", "")


def test_a_switch_takes_no_value_as_a_flag_and_true_or_false_elsewhere() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = vars(parser.parse_args(["--deterministic"]))
    assert resolve({"deterministic": flags["deterministic"]}, {}).settings.deterministic
    no = {"deterministic": vars(parser.parse_args(["--no-deterministic"]))["deterministic"]}
    assert not resolve(no, {"LLM_DETERMINISTIC": "true"}).settings.deterministic
    assert resolve({}, {"LLM_DETERMINISTIC": "true"}).settings.deterministic
    assert not resolve({}, {"LLM_DETERMINISTIC": "false"}).settings.deterministic
    with pytest.raises(UsageError, match="LLM_DETERMINISTIC: 'perhaps' is wrong, it takes true or false"):
        resolve({}, {"LLM_DETERMINISTIC": "perhaps"})


def test_a_flag_that_is_not_given_leaves_no_trace() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert vars(parser.parse_args(["--port", "1"])) == {"port": "1", "config": None}


def test_the_cache_folder_is_the_settings_or_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder(ServeSettings(cache_dir=str(tmp_path))) == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder(ServeSettings()) == tmp_path / "xdg" / "pestle"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder(ServeSettings()).parts[-3:] == ("Library", "Caches", "pestle")
