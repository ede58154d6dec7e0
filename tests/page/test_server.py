"""The live page's server: it says what is in a run folder, to whom it should, and leaves everything as it was."""

import asyncio
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import treesearch as ts
from tests.support.pages import HOSTILE, Pixels, brightness, growing, pixels
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.cli.main import main
from treesearch.page import server
from treesearch.page.guard import HEADERS, is_loopback
from treesearch.page.listing import folders
from treesearch.page.view import View
from treesearch.runs import follow

pytest.importorskip("starlette")
testclient = pytest.importorskip("starlette.testclient", exc_type=ImportError)
LOCAL = "http://localhost:8765"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    pixels(folder / "images", outputs=True)
    for _ in growing(folder / "deep" / "vectors <b>"):
        pass
    return folder


@pytest.fixture(scope="module")
def page(root):
    return testclient.TestClient(server.make_app(root), base_url=LOCAL)


@pytest.fixture
def fresh(monkeypatch):
    """Views that look every time."""
    monkeypatch.setattr("treesearch.page.view.PATIENCE", 0.0)
    monkeypatch.setattr("treesearch.page.view.RESTS", 0.0)


def result_of(folder):
    from treesearch.cli.show import read_result_of

    return read_result_of(folder)[1]


def columns(data):
    n = len(data) // 10
    return np.frombuffer(data, "<i4", n), np.frombuffer(data, "<f4", n, 4 * n), np.frombuffer(data, "<i2", n, 8 * n)


def test_the_list_has_every_run_with_its_last_figures(page, root):
    found = page.get("/api/runs").json()
    lines = {line["run"]: line for line in found["runs"]}
    assert set(lines) == {"images", "deep/vectors <b>"}
    assert lines["images"]["tasks"] == len(HOSTILE)
    assert (lines["images"]["nfe"], lines["images"]["limit"], lines["images"]["status"]) == (90, 90, "finished")
    assert lines["images"]["best"] == pytest.approx(
        max(float(t.rewards.max()) for t in result_of(root / "images").tasks)
    )


def test_nodes_values_and_figures_are_those_of_the_run(page, root):
    tree = result_of(root / "deep" / "vectors <b>").tree
    run = {"run": "deep/vectors <b>"}
    parent, reward, t = columns(page.get("/api/nodes", params=run).content)
    np.testing.assert_array_equal(parent, tree.parent[1:])
    np.testing.assert_array_equal(t, tree.t[1:])
    np.testing.assert_array_equal(reward, tree.reward[1:].astype("f4"))
    later = columns(page.get("/api/nodes", params=run | {"since": 7}).content)
    np.testing.assert_array_equal(later[0], parent[7:])
    values = np.frombuffer(page.get("/api/values", params=run).content, "<f4")
    np.testing.assert_array_equal(values, tree.value[1:].astype("f4"))
    summary = page.get("/api/summary", params=run).json()
    assert summary["log_z"] == result_of(root / "deep" / "vectors <b>").log_z
    assert any(line.startswith("log Z: ") for line in summary["certificate"])
    assert page.get("/api/gallery", params=run).json()[0]["kind"] == "numbers"


def test_texts_of_a_run_come_as_they_are_and_as_json_alone(page):
    answer = page.get("/api/about", params={"run": "images"})
    assert answer.json()["prompts"] == list(HOSTILE)
    assert answer.headers["content-type"] == "application/json"
    assert answer.content.isascii()
    assert answer.json()["resume"].endswith("images --kernel EXPR --reward EXPR")


def test_the_command_to_go_on_with_is_one_that_a_shell_reads_back(page, root, tmp_path):
    import shlex

    vectors = root / "deep" / "vectors <b>"
    typed = shlex.split(page.get("/api/about", params={"run": "deep/vectors <b>"}).json()["resume"])
    assert typed[:3] == ["treesearch", "resume", str(vectors.resolve())]
    copy = shutil.copytree(vectors, tmp_path / "$(touch owned)")
    (copy / "command.json").write_text("{}")
    assert shlex.split(View(copy).about()["resume"]) == ["treesearch", "resume", str(copy.resolve())]


def test_samples_are_seen_decoded_where_they_were_written_and_as_states_elsewhere(page, root):
    run = {"run": "images", "task": 1}
    gallery = page.get("/api/gallery", params=run).json()
    rewards = [sample["reward"] for sample in gallery]
    assert rewards == sorted(rewards, reverse=True)
    assert {sample["of"] for sample in gallery[:8]} == {"decoded"}
    assert {sample["of"] for sample in gallery[8:]} == {"state"}
    assert len(gallery) > 8
    session = ts.api.open_session(root / "images", Pixels(), brightness, look=True)
    raw = session.result().tasks[1].fetch.raw(np.array([gallery[-1]["node"]])).numpy()[0, 0]
    session.close()
    png = page.get("/api/picture", params=run | {"node": gallery[-1]["node"]})
    assert png.headers["content-type"] == "image/png"
    seen = np.asarray(Image.open(io.BytesIO(png.content)))
    times = len(seen) // 8
    np.testing.assert_array_equal(seen[::times, ::times], ((raw.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8))


def test_a_lost_or_damaged_state_has_no_picture(tmp_path):
    result = pixels(tmp_path / "r", prompts=None, nfe=30)
    client = testclient.TestClient(server.make_app(tmp_path), base_url=LOCAL)
    node = int(result.leaves[0])
    params = {"run": "r", "task": 0, "node": node}
    assert client.get("/api/picture", params=params).status_code == 200
    shard = tmp_path / "r" / "states-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert client.get("/api/picture", params=params).status_code == 404
    assert client.get("/api/leaf", params=params).json()["reward"] == float(result.rewards[0])


@pytest.mark.parametrize("name", ["..", "../runs/images", "/etc", "", "images/outputs", "nothing"])
def test_only_listed_runs_are_opened(page, name):
    answer = page.get("/api/about", params={"run": name})
    assert (answer.status_code, answer.json()) == (404, {"error": "there is no such run"})


def test_numbers_that_are_none_and_tasks_and_nodes_that_are_not_there(page):
    assert page.get("/api/nodes", params={"run": "images", "task": "x"}).status_code == 400
    for params in ({"task": 3}, {"task": -1}, {"node": 0}, {"node": 10**6}):
        assert page.get("/api/leaf", params={"run": "images"} | params).status_code == 404
    assert page.get("/static/../server.py").status_code == 404


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path):
    pixels(tmp_path / "good", prompts=None, nfe=30)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text('{"format": "<b>"}')
    client = testclient.TestClient(server.make_app(tmp_path), base_url=LOCAL)
    lines = {line["run"]: line for line in client.get("/api/runs").json()["runs"]}
    assert "this version reads format" in lines["bad"]["error"]
    assert lines["good"]["status"] == "finished"
    answer = client.get("/api/about", params={"run": "bad"})
    assert (answer.status_code, "reads format" in answer.json()["error"]) == (409, True)


def test_a_folder_that_is_a_run_is_listed_itself(root):
    assert list(folders(root / "images")) == ["."]


def test_looking_changes_nothing_and_runs_nothing_that_a_folder_names(tmp_path):
    pixels(tmp_path / "r", prompts=None, nfe=30, outputs=True)
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef make(): ...\n")
    (tmp_path / "r" / "command.json").write_text(json.dumps({"kernel": f"{trap}:make", "reward": f"{trap}:make"}))

    def standing():
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        return [(path.name, path.stat().st_mtime_ns, path.read_bytes()) for path in files]

    before = standing()
    client = testclient.TestClient(server.make_app(tmp_path), base_url=LOCAL)
    for what in ("runs", "about", "nodes", "values", "summary", "gallery", "leaf", "picture"):
        assert client.get(f"/api/{what}", params={"run": "r", "node": 1}).status_code == 200
    assert standing() == before


def test_a_run_is_followed_wave_by_wave(tmp_path, fresh):
    view, seen = None, []
    for snapshot in growing(tmp_path / "r"):
        view = View(tmp_path / "r") if view is None else view
        state = view.state(len(seen))
        seen += state["history"]["nodes"]
        assert state["status"] == "running"
        assert (state["waves"], seen[-1]) == (snapshot.wave + 1, snapshot.record["nodes"])
        np.testing.assert_array_equal(view.table(0)["parent"], snapshot.result().tree.parent[1:])
    assert view is not None
    assert view.state()["status"] == "finished"
    assert view.summary(0)["status"] == "budget"
    again = result_of(tmp_path / "r")
    np.testing.assert_array_equal(np.frombuffer(view.values(0), "<f4"), again.tree.value[1:].astype("f4"))
    assert len(view.nodes(0)) == 10 * (len(again.tree) - 1)


def test_half_a_wave_is_not_there_yet(tmp_path, fresh):
    for _ in growing(tmp_path / "r"):
        pass
    log, copy = tmp_path / "r" / "tree.bin", tmp_path / "copy"
    whole = log.read_bytes()
    shutil.copytree(tmp_path / "r", copy)
    config = json.loads((copy / "run.json").read_text())
    ends = [at.start() for at in re.finditer(b"WAVE", whole)] + [len(whole)]
    from treesearch.runs.config import stamped

    (copy / "run.json").write_text(json.dumps(stamped(config | {"waves": 0, "status": "running"})))
    view = View(copy)
    for wave in range(len(ends) - 1):
        (copy / "tree.bin").write_bytes(whole[: ends[wave + 1] - 3])
        assert view.state()["waves"] == wave
        (copy / "tree.bin").write_bytes(whole[: ends[wave + 1]])
        assert view.state()["waves"] == wave + 1


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    result = pixels(tmp_path / "r", prompts=[{"scale": float("inf")}, {"scale": [float("nan"), 1.0]}])
    assert len(result.tasks) == 2
    client = testclient.TestClient(server.make_app(tmp_path), base_url=LOCAL)
    assert client.get("/api/about", params={"run": "r"}).json()["prompts"] == [{"scale": None}, {"scale": [None, 1.0]}]


def test_the_page_stays_with_the_runs_that_were_looked_at_last(tmp_path, monkeypatch):
    for name in "abc":
        pixels(tmp_path / name, prompts=None, nfe=30)
    monkeypatch.setattr(server, "OPENED", 2)
    runs = server.Runs(tmp_path)
    views = {name: runs.view(name) for name in "aba"}
    assert runs.view("a") is views["a"]
    runs.view("c")
    assert runs.view("a") is views["a"]
    assert runs.view("b") is not views["b"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["nowhere"], "nowhere is no folder"),
        ([".", "--port", "70000"], "expected 0..65535"),
        ([".", "--host", "192.0.2.1"], "--host takes an address of this machine"),
    ],
)
def test_a_page_that_cannot_be_served_says_why(given, why, capsys):
    assert main(["serve", *given]) == 2
    assert why in capsys.readouterr().err


def test_workers_are_shown_as_far_as_their_file_can_be_believed(tmp_path, fresh):
    pixels(tmp_path / "r", prompts=None, nfe=30)
    view, file = View(tmp_path / "r"), tmp_path / "r" / "workers.json"
    assert view.state()["workers"] is None
    together = {"workers": 1, "busy": 0.5, "fill": 1.0, "queue": 2.0, "mb_in": 0.1, "mb_out": 0.2}
    view._follower.blocks[-1].meta["history"]["workers"] = together
    assert view.state()["workers"] == {"together": together, "each": {}}
    one = {"node": "<b>", "device": "cpu", "busy": 0.5, "fill": 1.0, "nfe": 30, "nfe_per_second": 9.0, "batch_size": 4}
    for worker, there in ((one | {"memory_mb": None}, True), (one, False), (one | {"memory_mb": "x"}, False)):
        file.write_text(json.dumps(together | {"by_worker": {"0": worker}}))
        assert view.state()["workers"]["each"] == ({"0": worker} if there else {})


def test_a_run_that_was_killed_says_so(tmp_path, fresh, monkeypatch):
    from treesearch.runs.config import stamped

    pixels(tmp_path / "r", prompts=None, nfe=30)
    config = json.loads((tmp_path / "r" / "run.json").read_text())
    (tmp_path / "r" / "run.json").write_text(json.dumps(stamped(config | {"status": "running"})))
    monkeypatch.setattr(follow, "ASKED", 0.0)
    assert View(tmp_path / "r").state()["status"] == "killed"


def test_another_run_in_the_same_folder_begins_anew(tmp_path, fresh, monkeypatch):
    pixels(tmp_path / "r", prompts=None, nfe=60)
    view = View(tmp_path / "r")
    first = view.state()
    assert view.summary(0)["samples"] == 20
    shutil.rmtree(tmp_path / "r")
    result = pixels(tmp_path / "r", prompts=None, nfe=30)
    monkeypatch.setattr("treesearch.page.view.RESTS", 1e9)
    view._rest = math.inf  # the old read-out may not stay, however long it may rest
    assert view.summary(0)["samples"] == len(result.leaves)
    second = view.state(since=first["waves"])
    assert second["id"] != first["id"]
    assert second["nodes"] == [len(result.tree) - 1]


def test_events_tell_only_what_is_new_and_end_where_the_run_is_gone(tmp_path, fresh, monkeypatch):
    monkeypatch.setattr(server, "POLL", 0.01)
    stream = growing(tmp_path / "r")
    next(stream)

    async def listen():
        events = server._events(server.Runs(tmp_path), "r")
        first = await anext(events)
        next(stream)
        second = await anext(events)
        stream.close()
        shutil.rmtree(tmp_path / "r")
        return first, second, [event async for event in events]

    first, second, rest = asyncio.run(listen())
    one, two = (json.loads(event.split("data: ")[1]) for event in (first, second))
    assert first.startswith("event: state\n")
    assert (one["since"], one["waves"], two["since"], two["waves"]) == (0, 1, 1, 2)
    assert len(two["history"]["nfe"]) == 1
    assert rest[-1].startswith("event: gone\n")


def test_every_answer_says_what_a_browser_may_do_with_it(page):
    answers = [page.get(path) for path in ("/", "/static/app.js", "/api/runs", "/nothing", "/api/about?run=x")]
    answers += [page.post("/api/runs"), page.get("/", headers={"host": "evil.example"})]
    for answer in answers:
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert "access-control-allow-origin" not in answer.headers
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404, 404, 405, 421]
    policy = HEADERS["content-security-policy"]
    assert "unsafe" not in policy
    assert "*" not in policy


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "127.0.0.2:80", "[::1]:80"])
def test_this_machine_is_answered_by_its_names(page, host):
    assert page.get("/api/runs", headers={"host": host}).status_code == 200


def test_another_site_in_the_same_browser_gets_nothing_but_the_page_itself(page):
    for site in ("cross-site", "same-site"):
        asked = {"sec-fetch-site": site, "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"}
        assert page.get("/api/runs", headers=asked).status_code == 403
        assert (
            page.get("/static/app.js", headers={"sec-fetch-site": site, "sec-fetch-dest": "script"}).status_code == 403
        )
    visit = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert page.get("/", headers=visit).status_code == 200
    assert page.get("/", headers=visit | {"sec-fetch-dest": "iframe"}).status_code == 403


def test_beyond_this_machine_everything_needs_the_token(root):
    client = testclient.TestClient(server.make_app(root, "secret"), base_url="http://box:1", follow_redirects=False)
    for path in ("/", "/static/app.js", "/api/runs", "/?token=", "/?token=secrex", "/?token=%ED%B2%80"):
        assert client.get(path).status_code == 401
    opened = client.get("/?token=secret&a=b")
    assert (opened.status_code, opened.headers["location"]) == (303, "/?a=b")
    assert {"HttpOnly", "SameSite=strict"} <= set(re.split("; ", opened.headers["set-cookie"]))
    assert client.get("/api/runs").status_code == 200  # by the cookie
    client.cookies.clear()
    assert client.get("/api/runs", headers={"cookie": "treesearch-token=wrong"}).status_code == 401


def test_which_addresses_are_this_machine_s_alone():
    known = {
        "127.0.0.1": True,
        "::1": True,
        "localhost": True,
        "127.8.0.1": True,
        "0.0.0.0": False,
        "::": False,
        "box": False,
    }
    assert {host: is_loopback(host) for host in known} == known


def test_the_page_s_script_parses_no_markup_and_asks_nobody_else():
    for file in server.STATIC.iterdir():
        text = file.read_text("utf-8")
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "srcdoc",
        ):
            assert word not in text, f"{file.name} uses {word}"
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), f"{file.name} names another site"


@pytest.mark.parametrize("host", ["localhost:8765.evil.example", "localhost:", "[::1", "128.0.0.1", ""])
def test_other_names_are_not_answered(page, host):
    assert page.get("/api/runs", headers={"host": host}).status_code == 421


def test_pictures_of_a_run_are_in_its_folder(tmp_path):
    pixels(tmp_path / "r", prompts=None, nfe=30, outputs=True)
    (tmp_path / "r" / "outputs").rename(tmp_path / "elsewhere")
    (tmp_path / "r" / "outputs").symlink_to(tmp_path / "elsewhere")
    client = testclient.TestClient(server.make_app(tmp_path), base_url=LOCAL)
    gallery = client.get("/api/gallery", params={"run": "r"}).json()
    assert {sample["of"] for sample in gallery} == {"state"}
    (tmp_path / "r" / "outputs").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "r" / "outputs")
    gallery = client.get("/api/gallery", params={"run": "r"}).json()
    assert "decoded" in {sample["of"] for sample in gallery}


def test_of_a_run_of_texts_those_written_are_shown(tmp_path):
    class Texts(LinearGaussian):
        def decode(self, x0):
            return [f"text {float(row[0]):.3f}" for row in x0]

    def length(texts):
        return [float(text.split()[1]) for text in texts]

    ts.search(Texts(num_steps=2), length, ts.BestOfN(n=20), store=tmp_path / "r", outputs=True)
    client = testclient.TestClient(server.make_app(tmp_path), base_url=LOCAL)
    gallery = client.get("/api/gallery", params={"run": "r"}).json()
    assert [sample["kind"] for sample in gallery] == ["text"] * 8


def test_a_run_is_named_by_what_was_typed(tmp_path, capsys):
    kernel = "gaussian(num_steps=3)"
    words = ["run", "best-of-n", "--n", "5", "--kernel", kernel, "--reward", "linear(1.0)", "--store"]
    assert main([*words, str(tmp_path / "r")]) == 0
    client = testclient.TestClient(server.make_app(tmp_path), base_url=LOCAL)
    assert client.get("/api/runs").json()["runs"][0]["kernel"] == kernel
    assert client.get("/api/about", params={"run": "r"}).json()["kernel"] == kernel
    assert main(["show", str(tmp_path / "r")]) == 0
    assert f"kernel   {kernel}" in capsys.readouterr().out
    (tmp_path / "r" / "command.json").write_text("[")
    assert client.get("/api/runs").json()["runs"][0]["kernel"] == "LinearGaussian"
