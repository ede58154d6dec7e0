"""Secrets in URLs and expressions: what may be shown."""

from __future__ import annotations

import pytest

from treesearch.rewards.redact import STRUCK, marked_url, public_url, redacted, secrets_of, struck

SECRET = "S3CR3T"


@pytest.mark.parametrize(
    "url",
    [
        f"http://h/hooks/{SECRET}/score",
        f"http://h:8000/score?key={SECRET}",
        f"https://h/v1?api-version=1&key={SECRET}",
        f"https://me:{SECRET}@h/score",
        f"https://{SECRET}@h/score",
        f"http://h/#{SECRET}",
        f"http://h/{SECRET.lower()}",
        f"http://h:notaport/{SECRET}",
    ],
)
@pytest.mark.parametrize(
    "template",
    [
        "http('{}')",
        '2*http("{}", batch_size=16) + digit(8).clip(-3, 0)',
        "./mine.py:make('{}', eta=0.5)",
        "package.module:make(url='{}')",
        "tds(mnist(), http('{}'))",
        "http('{}' 'more')",
        "http('' + '{}')",
        "f({{'url': '{}'}})",
        "f(['{}'])",
        "http('{}'",  # cannot be read
        "not an expression {}",
    ],
)
def test_urls(url: str, template: str) -> None:
    shown = redacted(template.format(url))
    assert SECRET.lower() not in shown.lower()
    assert STRUCK in shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "name", ["token", "api_key", "hf_token", "apikey", "password", "client_secret", "Authorization"]
)
def test_settings_that_are_secrets_by_name(name: str) -> None:
    for spec in (
        f"f({name}='{SECRET}')",
        f"f(options={{'{name}': '{SECRET}', 'seed': 1}})",
        f"./a.py:f({name}='{SECRET}')",
    ):
        assert SECRET not in redacted(spec)
    assert SECRET not in redacted(f"f({name}='S3' + 'CR3T')")


@pytest.mark.parametrize(
    "spec",
    [
        "2*digit(8)  + brightness()",
        "http('http://localhost:8000/v1/score')",
        'vlm_judge( "https://h/v1", "model", options={"max_tokens": 5}, token_env="NAME")',
        "diffusers('stabilityai/sd', tokenizer='a/b', key_dim=3)",
        "./mine.py:make",
        "hps('/data/hps.safetensors')",
        "not readable (",
    ],
)
def test_nothing_else_changes(spec: str) -> None:
    assert redacted(spec) == spec


def test_what_a_url_shows() -> None:
    assert public_url("http://h/v1/chat/completions") == "http://h/v1/chat/completions"
    assert public_url("http://h:80/a/b?c=d") == f"http://h:80/{STRUCK}"
    one, other = marked_url("http://h/one?key=a"), marked_url("http://h/two?key=a")
    assert one != other
    assert one == marked_url("http://h/one?key=b")  # keys are renewed
    assert redacted(f"f('{one}')") == f"f('{one}')"
    assert marked_url("http://h/score") == "http://h/score"


def test_secrets_are_struck_as_written_decoded_and_as_json() -> None:
    secrets = secrets_of('https://h/a%22b/score?x=c%2Fd&y=e"f')
    assert struck('got a%22b, a"b, a\\"b, c/d, e"f', secrets) == "got ***, ***, ***, ***, ***"
