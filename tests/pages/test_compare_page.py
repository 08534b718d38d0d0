"""report.html of a comparison, and `mimkd-ray report` of runs that somebody puts side by side."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
from evaluated import CLASSES, write_evaluation
from page_reader import Reader
from some_trials import search
from tiny_run import run_tiny

from mimkd_ray.__main__ import main
from mimkd_ray.pages.page import Page
from mimkd_ray.pages.sections import class_gains
from mimkd_ray.pages.write_pages import write_report
from mimkd_ray.search.report.build_report import report_html

WIDTHS = (1280, 400)
PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two arms with two seeds; of both arms the first seed is evaluated."""
    folder = tmp_path_factory.mktemp("runs") / "c"
    run_tiny(folder, compare={"seeds": 2, "arms": ("alone", "mimkd")})
    write_evaluation(folder / "alone-seed00", seed=1)
    write_evaluation(folder / "mimkd-seed00", seed=2)
    return folder


def reported(*arguments: str, capsys: pytest.CaptureFixture[str]) -> Reader:
    assert main(["report", *arguments]) == 0
    return Reader(Path(capsys.readouterr().out.strip()).read_text())


def per_class(run: Path) -> dict[str, float]:
    evaluation = json.loads((run / "evaluation.json").read_text())
    return {each["class"]: each["top1"] for each in evaluation["per_class"]}


def test_arms_side_by_side(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = reported(str(compared), capsys=capsys)
    result = json.loads((compared / "result.json").read_text())
    assert page.sections == ["arms", "curves", "classes", "calibration", "confusions", "runs", "differences", "again"]
    top1 = {arm: value["top1"] for arm, value in result["compare"].items()}
    gain = statistics.fmean(b - a for a, b in zip(top1["alone"], top1["mimkd"], strict=True))
    assert f"{gain:+.2f} ± " in page.text
    assert "of 2 seeds: too few seeds to say that it helps" in page.text
    seeds, means = page.figure("Side by side")["data"]
    assert seeds["x"] == [*top1["alone"], *top1["mimkd"]]
    assert means["x"] == pytest.approx([statistics.fmean(values) for values in top1.values()])
    assert len(page.figure("Held-out top-1")["data"]) == 4
    (bars,) = page.figure("Per class")["data"]
    alone, taught = per_class(compared / "alone-seed00"), per_class(compared / "mimkd-seed00")
    assert sorted(bars["x"]) == pytest.approx(sorted(taught[name] - alone[name] for name in CLASSES))
    _, *networks = page.figure("Accuracy by confidence")["data"]
    assert [each["name"] for each in networks] == ["student alone", "MIMKD"]
    assert all(each["y"] == pytest.approx([0.8 * x for x in each["x"]]) for each in networks)
    worst = json.loads((compared / "mimkd-seed00" / "evaluation.json").read_text())["confusions"][0]
    assert f"{worst['label']}\n{worst['prediction']}\n" in page.text
    assert "loss.name\nnone\nmimkd\n" in page.text  # not [] and ['mimkd']
    assert f"{result['teacher']['top1']:.2f} %" in page.text
    assert f"mimkd-ray train --config {compared}/config.json --run.name c-again" in page.text


def test_each_arm_has_a_link_or_the_command_that_makes_its_page(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared, tmp_path / "a b")
    own, other = (str(tmp_path / "a b" / name) for name in ("mimkd-seed00", "alone-seed01"))
    reported(own, capsys=capsys)
    for page in (
        reported(str(tmp_path / "a b"), capsys=capsys),
        reported(own, other, "--out", str(tmp_path / "a b" / "both.html"), capsys=capsys),
    ):
        links = [str(attrs["href"]) for tag, attrs in page.elements if tag == "a" and "#" not in str(attrs["href"])]
        assert links == ["mimkd-seed00/report.html"]
        assert f"mimkd-ray evaluate '{other}'" in page.text
        assert f"mimkd-ray evaluate '{own}'" not in page.text
    page = reported(own, other, "--out", str(tmp_path / "both.html"), capsys=capsys)
    assert ("a", {"href": "a%20b/mimkd-seed00/report.html"}) in page.elements


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium here")
def test_a_browser_draws_every_figure_and_nothing_is_too_wide(compared: Path, tmp_path: Path) -> None:
    """A run, a comparison and a search, each on a desk and on a telephone, in one of which it is dark."""
    files = [Path(write_report(str(compared / "mimkd-seed00"))), Path(write_report(str(compared)))]
    files.append(tmp_path / "search.html")
    files[-1].write_text(report_html(search(40), "top1", "a search", {"recipe": "x" * 200}))
    schemes = [("light", "dark"), ("dark", "light"), ("light", "dark")]
    frames = [
        (f.as_uri(), *each) for f, pair in zip(files, schemes, strict=True) for each in zip(WIDTHS, pair, strict=True)
    ]
    page = (Path(__file__).parent / "frames.html").read_text().replace("FRAMES", json.dumps(frames))
    (tmp_path / "frames.html").write_text(page)
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'own'}"]
    options = [
        "--allow-file-access-from-files",
        "--virtual-time-budget=60000",
        "--dump-dom",
        str(tmp_path / "frames.html"),
    ]
    shown = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads(re.findall("<pre>(.*)</pre>", shown)[0])
    counts = [len(Reader(file.read_text()).figures) for file in files for _ in WIDTHS]
    assert [each["plots"] for each in seen] == counts
    assert min(counts) > 7
    assert [each["paper"] for each in seen] == [PAPER[scheme] for _, _, scheme in frames]
    assert [each["width"] for each in seen] == [width for _, width, _ in frames]
    assert [each for each in seen if each["needs"] > each["width"]] == []


def test_an_arm_alone_tells_its_gain(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = reported(str(compared / "mimkd-seed00"), capsys=capsys)
    assert "points over the student alone" in page.text
    (bars,) = page.figure("Per class")["data"]
    alone, taught = per_class(compared / "alone-seed00"), per_class(compared / "mimkd-seed00")
    assert bars["x"] == pytest.approx(sorted((taught[name] - alone[name] for name in CLASSES), reverse=True))


def test_runs_of_anybody(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(compared / name) for name in ("mimkd-seed00", "alone-seed01")]
    page = reported(*runs, "--out", str(tmp_path / "both.html"), capsys=capsys)
    assert "against alone-seed01" in page.text, "the one without a teacher"
    assert all(run in page.text for run in runs)
    assert "mimkd-ray train" not in page.text


def test_an_arm_has_one_colour_and_its_name(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the arm is the only one that was evaluated, or that has nats."""
    runs = [str(compared / name) for name in ("alone-seed01", "mimkd-seed00")]
    page = reported(*runs, "--out", str(tmp_path / "both.html"), capsys=capsys)
    curves = {each["name"]: each["line"]["color"] for each in page.figure("Held-out top-1")["data"]}
    _, network = page.figure("Accuracy by confidence")["data"]
    (nats,) = page.figure("Information, held out, sum of terms")["data"]
    assert network["line"]["color"] == nats["line"]["color"] == curves["mimkd-seed00"] != curves["alone-seed01"]
    assert nats["showlegend"]


def test_a_comparison_that_has_not_ended(tmp_path: Path, compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(compared, tmp_path / "c")
    (tmp_path / "c" / "result.json").unlink()
    shutil.rmtree(tmp_path / "c" / "alone-seed01")
    (tmp_path / "c" / "mimkd-seed01" / "result.json").unlink()
    page = reported(str(tmp_path / "c"), capsys=capsys)
    assert "2\nfinished runs of 3" in page.text
    shutil.rmtree(tmp_path / "c" / "alone-seed00")
    (tmp_path / "c" / "mimkd-seed00" / "result.json").unlink()
    assert "not finished" in reported(str(tmp_path / "c"), capsys=capsys).text


def test_evaluations_at_the_ends_alone_are_no_curves(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared, tmp_path / "c")
    for file in (tmp_path / "c").glob("*/metrics.jsonl"):
        found = [line for line in file.read_text().splitlines() if '"eval"' not in line or '"epoch": 2' in line]
        file.write_text("\n".join(found) + "\n")
    titles = reported(str(tmp_path / "c"), capsys=capsys).titles
    assert "Learning rate" in titles
    assert "Held-out top-1" not in titles


def test_runs_of_other_seeds_are_no_pairs(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the folder of a seed, the others are paired as before."""
    shutil.copytree(compared, tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "alone-seed00")
    result = json.loads((compared / "result.json").read_text())["compare"]
    gain = result["mimkd"]["top1"][1] - result["alone"]["top1"][1]
    page = reported(str(tmp_path / "c"), capsys=capsys)
    assert re.search(rf"\n{re.escape(f'{gain:+.2f}')}\n{int(gain > 0)} of 1\n", page.text)


def test_runs_without_a_top1(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No image has a label: rates and information stand side by side."""
    shutil.copytree(compared, tmp_path / "c")
    runs = sorted((tmp_path / "c").glob("*-seed0?"))
    for file in [*(run / "result.json" for run in runs), tmp_path / "c" / "teacher.json"]:
        value = json.loads(file.read_text())
        value.get("student", value)["top1"] = None
        file.write_text(json.dumps(value))
    page = reported(*map(str, runs), "--out", str(tmp_path / "all.html"), capsys=capsys)
    assert "4\nfinished runs of 4" in page.text
    rate = json.loads((runs[0] / "result.json").read_text())["images_per_second"]
    assert f"\n{rate:,.0f}\n" in page.text
    assert "held-out top-1 of" not in page.text


def test_bad_input(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err
    assert main(["report", str(compared), "--out", "x.html"]) == 2
    assert "--out is for several runs" in capsys.readouterr().err
    run = str(compared / "mimkd-seed00")
    assert main(["report", run, run]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_names_of_runs_are_no_markup_of_plotly() -> None:
    page = Page("two runs")
    class_gains(page, {"a<b>": {"ant": 1.0}, "<i>c</i>": {"ant": 2.0}}, {"ant": 3}, "")
    assert page._figures[0]["layout"]["xaxis"]["title"]["text"].startswith("&lt;i&gt;c&lt;/i&gt; minus a&lt;b&gt;,")
