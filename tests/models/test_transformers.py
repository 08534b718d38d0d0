"""Networks of Hugging Face's transformers as teachers: by the function that docs/teachers.md shows."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_run import run_tiny, tiny_config

from mimkd_ray.cli.preflight import preflight
from mimkd_ray.errors import UserError
from mimkd_ray.models.build_model import build_model
from mimkd_ray.models.outputs import logits_from

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")

DOCS = Path(__file__).parents[2] / "docs" / "teachers.md"
ON_HUB = "facebook/dinov3-vits16-pretrain-lvd1689m"
WIDTH = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small encoder of patches, as `save_pretrained` writes it."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(3)
    model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=8, patch_size=4, **sizes))
    model.save_pretrained(tmp_path / "net")
    return tmp_path / "net"


@pytest.fixture
def name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The function of the page, which here reads the folder."""
    page = DOCS.read_text()
    block = page[
        page.index("    # my_teachers.py") : page.index("    python jobs/imagenet.py r34_r18 --teacher.name my")
    ]
    assert block.count(ON_HUB) == 1
    (tmp_path / "my_teachers.py").write_text(textwrap.dedent(block).replace(ON_HUB, str(folder)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_teachers", raising=False)
    return "my_teachers:dinov3"


def test_its_pooled_vector_stands_where_logits_would(name: str, folder: Path) -> None:
    images = torch.rand(2, 3, 8, 8)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        ours = logits_from(build_model(name, WIDTH).eval(), images)
        assert torch.equal(ours, theirs(pixel_values=images).pooler_output)


def test_a_student_learns_from_it_without_labels(name: str, tmp_path: Path) -> None:
    sections = {
        "teacher": {"name": name, "classes": WIDTH},
        "data": {"labels": "none"},
        "loss": {"feature_pairs": ()},
    }
    preflight(tiny_config(**sections))
    result = run_tiny(tmp_path / "run", **sections)
    assert any(term.startswith("feature/") for term in result["nats"]), "tokens of its layers are maps"
    assert 0 < result["student"]["knn"] <= 100


def test_given_as_a_model_of_timm_it_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"is a dinov2 of Hugging Face's transformers.*AutoModel.from_pretrained\('/"):
        build_model(f"local-dir:{folder}", WIDTH, "published")
