"""Pictures show the figures of their sources, look the same each time, and can be read by everyone."""

from __future__ import annotations

import json
import struct
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from nest_runtime.cli.main import main
from nest_runtime.evaluate import Case
from nest_runtime.evaluate.judges.base import Verdict
from nest_runtime.evaluate.records import Record
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.patch.patch import Patch
from nest_runtime.plots import KINDS, NeuronView, draw, neurons, profiles, read_sources, results, style
from nest_runtime.plots.scan import Scan, SiteScan
from nest_runtime.plots.sources import Sources
from nest_runtime.plots.tradeoff import tradeoff
from nest_runtime.plots.view import layer_and_kind, view_of_patch
from tests.cli.test_commands import write_prompts
from tests.conftest import save_tiny
from tests.support.patches import random_site
from tests.support.store import BASE_A

README_PIXELS = 830  # the width of a README's column on GitHub


def layered_patch(layers: int = 4, version: str = "v1") -> Patch:
    """A patch with gate and up sites in every layer, z-scores, silhouettes and loadings."""
    sites = []
    for layer in range(layers):
        for number, leaf in enumerate(("gate_proj", "up_proj")):
            site = random_site(
                f"model.layers.{layer}.mlp.{leaf}",
                200,
                16,
                neurons=24,
                clusters=3,
                loadings=True,
                seed=2 * layer + number,
            )
            z = torch.linspace(1.5, 4.0, 24) * torch.tensor([1.0, -1.0] * 12)
            stats = {"silhouette": 0.1 + 0.05 * layer, "probe_accuracy": 0.9, "threshold": 1.5}
            sites.append(replace(site, z=z, stats=stats))
    return Patch(
        name="test",
        version=version,
        base_hash=BASE_A,
        rows_digest="sha256:" + "c" * 64,
        architecture="LlamaForCausalLM",
        sites=tuple(sites),
    )


def result(patch: str, hits: dict[str, tuple[int, int]], refused: int = 1) -> EvalResult:
    """An evaluation: (complied, asked) per family, and ten benign prompts."""
    records = []
    for family, (complied, asked) in hits.items():
        for number in range(asked):
            case = Case(f"{family}/{number}", ({"role": "user", "content": "x"},), "harmful", "jailbreak-seen", family)
            records.append(_record(case, "complied" if number < complied else "refused"))
    for number in range(10):
        case = Case(f"benign/{number}", ({"role": "user", "content": "x"},), "benign", "over-refusal")
        records.append(_record(case, "refused" if number < refused else "complied"))
    return EvalResult("tiny", BASE_A, patch, None, ("phrases",), tuple(records), created="2026-11-24T00:00:00+00:00")


def _record(case: Case, outcome: str) -> Record:
    return Record.of(case, case.messages, "answer", {"phrases": Verdict(outcome)})


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(item) for item in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def size_of(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])  # type: ignore[return-value]


def test_a_patch_gives_four_pictures_in_two_formats_and_the_same_bytes_again(tmp_path: Path) -> None:
    sources = Sources((view_of_patch(layered_patch(2)),))
    first = draw(sources, tmp_path / "one")
    assert [item.path.name for item in first] == [
        f"{kind}.{suffix}" for kind in ("neurons", "z", "silhouette", "norms") for suffix in ("png", "svg")
    ]
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.hashsalt": None}):  # a user's own settings
        second = draw(sources, tmp_path / "two", kinds=("neurons", "silhouette"))
        assert matplotlib.rcParams["font.size"] == 30
    assert len(second) == 4
    for b in second:
        assert (tmp_path / "one" / b.path.name).read_bytes() == b.path.read_bytes(), b.path.name
    for a in first:
        if a.path.suffix == ".png":
            assert min(size_of(a.path)) > 400
        else:
            assert ET.fromstring(a.path.read_bytes()).tag.endswith("svg")


def test_the_map_shows_every_neuron_at_its_place() -> None:
    patch = layered_patch()
    with style.styled():
        made = neurons.neuron_map(view_of_patch(patch))
    gate, up, counts = made.axes
    for axes, leaf in ((gate, "gate_proj"), (up, "up_proj")):
        marks = [part for part in axes.collections if isinstance(part, PathCollection)]
        points = np.concatenate([np.asarray(part.get_offsets()) for part in marks])
        shown = {(round(float(x)), round(float(y))) for x, y in points}
        assert len(points) == patch.neurons // 2
        meant = {
            (neuron, layer_and_kind(site.name)[0])
            for site in patch.sites
            if site.name.endswith(leaf)
            for neuron in site.neurons.tensor().tolist()
        }
        assert meant == shown
    assert sum(bar.get_width() for bar in counts.patches) == patch.neurons


def test_bars_are_as_high_as_the_figures() -> None:
    patch = layered_patch()
    view = view_of_patch(patch)
    with style.styled():
        norms, silhouettes = neurons.update_norms(view), neurons.silhouettes(view)
        z = neurons.z_histograms(view)
    wanted = [float(site.dense().norm()) for leaf in ("gate", "up") for site in patch.sites if leaf in site.name]
    assert [bar.get_height() for bar in norms.axes[0].patches] == pytest.approx(wanted, rel=1e-5)
    heights = [bar.get_height() for bar in silhouettes.axes[0].patches]
    assert heights == pytest.approx([0.1, 0.15, 0.2, 0.25] * 2)
    assert sum(bar.get_height() for bar in z.axes[0].patches) == patch.neurons
    middle = [bar for bar in z.axes[0].patches if -1.4 < bar.get_x() + bar.get_width() / 2 < 1.4]
    assert sum(bar.get_height() for bar in middle) == 0  # nothing between the thresholds


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=50),
    st.one_of(st.just(0.0), st.floats(0.1, 10)),
)
def test_no_bin_lies_across_the_threshold(values: list[float], threshold: float) -> None:
    edges = neurons._edges(np.array(values), threshold)
    assert edges[0] <= min(values) + 1e-6
    assert edges[-1] >= max(values) - 1e-6
    assert (np.diff(edges) > 0).all()
    assert len(edges) < 200
    width = edges[1] - edges[0]
    if threshold > width:
        assert abs(threshold / width - round(threshold / width)) < 1e-6


@pytest.mark.parametrize(
    ("model_class", "config_class", "changes"),
    [
        ("LlamaForCausalLM", "LlamaConfig", {}),
        ("Phi3ForCausalLM", "Phi3Config", {}),
        ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    ],
)
def test_layers_and_kinds_are_read_from_names(
    model_class: str, config_class: str, changes: dict[str, int], tmp_path: Path
) -> None:
    from nest_runtime.model.anatomy import find_projections
    from nest_runtime.model.load import load_model

    model = load_model(str(save_tiny(tmp_path / "m", model_class, config_class, **changes))).model
    for projection in find_projections(model):
        assert layer_and_kind(projection.name) == (projection.layer, projection.kind)


def test_family_bars_and_the_tradeoff(tmp_path: Path) -> None:
    base = result("base", {"fiction": (1, 4), "role-play": (9, 10)}, refused=0)
    v1 = result("v1", {"fiction": (0, 4), "role-play": (1, 10)}, refused=2)
    with style.styled():
        bars, points = results.families([base, v1]), tradeoff(results.tradeoff_points([base, v1]), joined=True)
    assert [label.get_text() for label in bars.axes[0].get_yticklabels()] == ["role-play (n = 10)", "fiction (n = 4)"]
    assert [bar.get_width() for bar in bars.axes[0].patches] == pytest.approx([90, 25, 10, 0])
    (path,) = [line for line in points.axes[0].lines if len(line.get_xdata()) == 2]
    assert np.asarray(path.get_xydata()) == pytest.approx(np.array([[0, 1000 / 14], [20, 100 / 14]]))
    names = [base.save(tmp_path / "base.json"), v1.save(tmp_path / "v1.json")]
    drawn = draw(read_sources([str(name) for name in names]), tmp_path / "out", formats=("png",))
    assert [item.kind for item in drawn] == ["families", "tradeoff"]


def test_results_of_one_name_are_told_apart() -> None:
    same = result("v1", {"fiction": (0, 4)})
    assert results.labels_of([same, same]) == ["tiny v1", "tiny v1"]
    assert results.labels_of([same]) == ["v1"]


def scan_of(view: NeuronView, prompts: int) -> Scan:
    """What running prompts might have shown of a view: random profiles, falling silhouettes."""
    rng = np.random.default_rng(0)
    sites = tuple(
        SiteScan(site, rng.normal(size=site.d_out), {k: 0.5 / k for k in range(2, 9)}, rng.normal(size=(24, prompts)))
        for site in view.sites
    )
    return Scan(view.title, sites, np.array([1, 0, 0] * (prompts // 3)))


def painted(layers: int) -> dict[str, Any]:
    """Every kind of picture there is but a comparison's own, of a model with so many layers."""
    view = view_of_patch(layered_patch(layers))
    scan = scan_of(view, 900)
    both = [result("base", {"refusal-suppression": (1, 4), "fiction": (0, 9)}), result("v1", {"fiction": (0, 4)})]
    return {
        "neurons": neurons.neuron_map(view),
        "z": neurons.z_histograms(view, scan.z),
        "silhouette": neurons.silhouettes(view),
        "norms": neurons.update_norms(view),
        "silhouette-by-k": profiles.silhouette_by_k(scan),
        "clusters": profiles.cluster_profiles(scan),
        "families": results.families(both),
        "tradeoff": tradeoff(results.tradeoff_points(both), joined=True),
    }


@pytest.mark.parametrize("layers", [2, 32])
def test_everything_can_be_read_at_the_size_of_a_readme(layers: int) -> None:
    with style.styled():
        made = painted(layers)
        assert set(made) == set(KINDS) - {"parameters"}
        for kind, picture in made.items():
            FigureCanvasAgg(picture).draw()  # lays out
            scale = README_PIXELS / (picture.get_figwidth() * 72)  # pixels per point
            texts = [text for text in picture.findobj(Text) if text.get_text().strip() and text.get_visible()]
            assert min(text.get_fontsize() for text in texts) * scale >= 9, kind
            box = picture.get_tightbbox()  # inches, of all that shows: nothing is cut off
            assert min(box.x0, box.y0) >= -0.02, kind
            assert box.x1 <= picture.get_figwidth() + 0.02, kind
            assert box.y1 <= picture.get_figheight() + 0.02, kind
            for axes in picture.axes:
                labels = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
                labels.sort(key=lambda box: box.y0)
                assert all(a.y1 <= b.y0 + 1 for a, b in pairwise(labels)), kind


def test_of_many_prompts_neighbours_share_a_column() -> None:
    view = view_of_patch(layered_patch(2))
    scan = scan_of(view, 900)
    groups, split = profiles._columns(scan.labels)
    assert sorted(np.concatenate(groups)) == list(range(900))
    assert [set(scan.labels[group]) for group in groups] == [{0}] * split + [{1}] * (len(groups) - split)
    assert len(groups) <= profiles.COLUMNS + 1
    with style.styled():
        (shown,) = profiles.cluster_profiles(scan).axes[0].get_images()
    first = scan.sites[0].profiles[view.sites[0].clusters == 0]
    assert np.asarray(shown.get_array())[0, 0] == pytest.approx(first[:, groups[0]].mean())
    few, split = profiles._columns(np.array([1, 0, 1]))
    assert ([group.tolist() for group in few], split) == ([[1], [0], [2]], 1)


def test_pictures_of_the_docs_fit_a_readme() -> None:
    """What docs/pictures holds: wide enough to be sharp in a README's column, no taller than a screen, small."""
    drawn = (Path(__file__).parents[2] / "docs" / "pictures").glob("*.png")
    files = sorted(file for file in drawn if not file.name.startswith("demo-"))  # those are screenshots
    assert files
    for file in files:
        width, height = size_of(file)
        assert width >= 1.4 * README_PIXELS, file.name
        assert height * README_PIXELS / width <= 1000, file.name
        assert file.stat().st_size < 150_000, file.name


def test_the_picture_of_v3_in_the_docs_is_what_the_command_draws(run: Any, tmp_path: Path) -> None:
    from matplotlib.image import imread

    status, _, errors = run("plot", "v3", "--kind", "neurons", "--format", "png", "--out", tmp_path)
    assert status == 0, errors
    kept = imread(Path(__file__).parents[2] / "docs" / "pictures" / "neurons.png")
    assert np.array_equal(imread(tmp_path / "neurons.png"), kept)


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen(color: str, matrix: Any) -> np.ndarray:
    """CIELAB of a color as seen with a color vision."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(matrix) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", [np.eye(3).tolist(), *BLINDNESS.values()])
def test_colors_of_one_picture_differ_in_every_color_vision(vision: Any) -> None:
    for group in (style.CLUSTER_COLORS[:4], tuple(style.KIND_COLORS.values()), results.COLORS[:3]):
        lab = [seen(color, vision) for color in group]
        gaps = [float(np.linalg.norm(a - b)) for i, a in enumerate(lab) for b in lab[:i]]
        assert min(gaps) > 10


@pytest.fixture
def located(run: Any, tiny_llama: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    harmful, benign = write_prompts(tmp_path)
    sites = tmp_path / "sites.json"
    common = ("--model", tiny_llama, "--harmful", harmful, "--benign", benign, "--z", "1.2")
    status, _, errors = run("locate", *common, "--out", sites)
    assert status == 0, errors
    return sites, harmful, benign


def test_a_scan_repeats_what_locating_found(located: tuple[Path, Path, Path], tiny_llama: Path) -> None:
    from nest_runtime.model.load import load_model
    from nest_runtime.plots.scan import scan
    from nest_runtime.prompts.examples import load_examples

    sites, harmful, benign = located
    (view,) = read_sources([str(sites)]).views
    loaded = load_model(str(tiny_llama))
    made = scan(view, loaded.model, loaded.tokenizer, load_examples(str(harmful)), load_examples(str(benign)))
    assert {site.view.name for site in made.sites} == {site.name for site in view.sites if len(site.neurons)}
    for site in made.sites:
        assert site.z[site.view.neurons] == pytest.approx(site.view.z, abs=1e-4)
        assert int((np.abs(site.z) > (site.view.threshold or 0)).sum()) >= len(site.view.neurons)
        if site.view.silhouette is not None:
            assert site.silhouettes[site.view.n_clusters] == pytest.approx(site.view.silhouette, abs=1e-4)
        assert site.profiles.shape == (len(site.view.neurons), 24)
    assert made.labels.tolist() == [1] * 12 + [0] * 12


def test_the_command_draws_from_sites_and_prompts(
    run: Any, located: tuple[Path, Path, Path], tiny_llama: Path, tiny_qwen: Path, tmp_path: Path
) -> None:
    sites, harmful, benign = located
    prompts = ("--harmful", harmful, "--benign", benign)
    status, text, errors = run(
        "plot", sites, *prompts, "--model", tiny_llama, "--format", "png", "--out", tmp_path / "p", "--json"
    )
    assert status == 0, errors
    files = {item["kind"]: Path(item["path"]) for item in json.loads(text)["files"]}
    assert set(files) == {"neurons", "z", "silhouette", "silhouette-by-k", "clusters"}
    assert all(min(size_of(path)) > 200 for path in files.values())
    status, _, errors = run("plot", sites, *prompts, "--model", tiny_qwen)
    assert status == 3
    assert "--model" in errors


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["{sites}", "--kind", "nuerons"], 2, "closest: neurons"),
        (["{sites}", "--kind", "norms"], 2, "size of the update per layer (a patch)"),
        (["{sites}", "--kind", "clusters"], 2, "and prompts"),
        (["{sites}", "--format", "jpg"], 2, "png or svg"),
        (["{sites}", "--harmful", "{sites}"], 2, "go together"),
        (["{summary}"], 1, "eval --out"),
        (["{broken}"], 1, "cannot be read as JSON"),
        (["nowhere.json"], 1, "there is no file"),
        (["./nowhere.safetensors"], 1, "nowhere.safetensors"),
        ([], 2, "SOURCE"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    run: Any, tmp_path: Path, arguments: list[str], status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nest_runtime.train.sites import LocatedSite, SitesFile

    monkeypatch.chdir(tmp_path)
    site = LocatedSite("model.layers.0.mlp.gate_proj", 0, "gate", 4, 8, (1, 2), (2.0, 3.0), (0, 1))
    SitesFile((site,), {}, {}, BASE_A, "tiny").save(tmp_path / "sites.json")
    (tmp_path / "summary.json").write_text(json.dumps(result("v1", {"fiction": (0, 4)}).summary()))
    (tmp_path / "broken.json").write_text("{")
    names = {name: str(tmp_path / f"{name}.json") for name in ("sites", "summary", "broken")}
    found = run("plot", *[argument.format(**names) for argument in arguments])
    assert found[0] == status, found
    assert words in found[2]
    assert not (tmp_path / "pictures").exists()


def test_two_patches_do_not_overwrite_each_other(tmp_path: Path) -> None:
    views = tuple(view_of_patch(layered_patch(version=version)) for version in ("v1", "v2"))
    drawn = draw(Sources(views), tmp_path, kinds=["norms"], formats=["svg"])
    assert [item.path.name for item in drawn] == ["norms-test-v1.svg", "norms-test-v2.svg"]


def test_without_matplotlib_it_says_what_to_install(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "find_spec", lambda name: None)
    status, _, errors = run("plot", "v1")
    assert status == 1
    assert "pip install 'matplotlib" in errors
