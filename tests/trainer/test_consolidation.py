"""The penalty on what an old domain depends on: its size, its scale, and that finding it out changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attune.contract.training import Lora
from attune_trainer.modeling.speech_model import TokenBatch
from attune_trainer.modeling.whisper import Whisper, load_whisper
from attune_trainer.training.adapters import Adapters, linear_layers
from attune_trainer.training.consolidation import Consolidation, Importance
from attune_trainer.training.full import AllWeights
from attune_trainer.training.methods import TrainingMethod
from attune_trainer.training.objective import TranscriptionLoss
from attune_trainer.training.quantised import QuantisedAdapters
from attune_trainer.training.transcripts import TranscriptEncoder
from attune_trainer.training.weights import trained_parameters
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from tests.trainer.tiny_whisper import build_tiny_whisper

RANK = 32  # of a tiny model every layer's full rank: its adapters can say everything


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_whisper(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def whisper(tiny: Path) -> Whisper:
    return load_whisper(tiny)


def make_batch(whisper: Whisper, *texts: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    encoder = TranscriptEncoder(whisper, "en")
    tokens: TokenBatch = encoder.batch([encoder.encode(text) or [] for text in texts])
    clips = [np.random.default_rng(len(text)).standard_normal(16000).astype(np.float32) for text in texts]
    return whisper.features(clips, 2.0), tokens.inputs, tokens.targets, whisper.lengths(clips, 2.0)


def listen(
    whisper: Whisper, strength: float = 2.0, rank: int = RANK, method: TrainingMethod | None = None
) -> tuple[Any, Consolidation]:
    model = (method or Adapters(Lora(rank=rank, alpha=2 * rank))).attach(whisper).eval()
    importance = Importance(model, whisper)
    importance.add(TranscriptionLoss(model, whisper), *make_batch(whisper, "press one", "stop"))
    importance.add(TranscriptionLoss(model, whisper), *make_batch(whisper, "hold the line"))
    return model, importance.consolidate(strength)


def layers(model: PeftModel) -> list[LoraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def set_change(layer: LoraLayer, share: float) -> None:
    """Lets an adapter change its layer's weights by a share of themselves."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    change = layer.get_base_layer().weight * share / layer.scaling["default"]
    with torch.no_grad():
        if change.shape[1] == RANK:
            down.copy_(torch.eye(RANK))
            up.copy_(change)
        else:
            down.copy_(change)
            up.copy_(torch.eye(RANK))


def test_what_changes_nothing_costs_nothing(whisper: Whisper) -> None:
    _, consolidation = listen(whisper)
    assert float(consolidation.penalty().detach()) == 0


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_weights_that_all_change_by_a_share_of_themselves_cost_half_lambda_times_its_square(
    whisper: Whisper, share: float
) -> None:
    model, consolidation = listen(whisper, strength=3.0)
    for layer in layers(model):
        set_change(layer, share)
    assert float(consolidation.penalty().detach()) == pytest.approx(0.5 * 3.0 * share**2, rel=1e-3)


def test_where_all_weights_train_the_layers_own_are_held(whisper: Whisper) -> None:
    _, consolidation = listen(whisper, strength=3.0, method=AllWeights())
    assert float(consolidation.penalty().detach()) == 0
    with torch.no_grad():
        for _, layer in linear_layers(whisper):
            layer.weight *= 1.1
    assert float(consolidation.penalty().detach()) == pytest.approx(0.5 * 3.0 * 0.1**2, rel=1e-3)
    consolidation.penalty().backward()
    assert all(layer.weight.grad is not None for _, layer in linear_layers(whisper))


def test_beside_4_bit_weights_adapters_cost_what_they_do_beside_the_same_weights_unpacked(tiny: Path) -> None:
    lora = Lora(rank=4)
    method = QuantisedAdapters(lora, torch.device("cpu"))
    packed, unpacked = load_whisper(tiny), load_whisper(tiny)
    with torch.no_grad():
        for _, layer in linear_layers(unpacked):
            layer.weight.copy_(method._round(layer.weight))
    found = []
    for whisper, one in ((packed, method), (unpacked, Adapters(lora))):
        model, consolidation = listen(whisper, method=one)
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in trained_parameters(model).values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
        found.append(float(consolidation.penalty().detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] > 0


def test_the_same_change_costs_the_same_whatever_was_listened_to_how_often(whisper: Whisper) -> None:
    model = Adapters(Lora(rank=4)).attach(whisper).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(std=0.1)
    found = []
    for times in (1, 3):
        importance = Importance(model, whisper)
        for _ in range(times):
            importance.add(TranscriptionLoss(model, whisper), *make_batch(whisper, "press one", "stop"))
        consolidation = importance.consolidate(1.0)
        for layer in layers(model):
            torch.nn.init.constant_(layer.lora_B["default"].weight, 0.1)
        found.append(float(consolidation.penalty().detach()))
        for layer in layers(model):
            torch.nn.init.zeros_(layer.lora_B["default"].weight)
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] > 0


def test_a_layer_that_the_loss_depends_on_little_may_change_freely(whisper: Whisper) -> None:
    """Here one whose first unit nobody reads."""
    network = whisper.model.model.decoder.layers[-1]
    with torch.no_grad():
        network.fc2.weight[:, 0] = 0  # nobody listens to the first unit between fc1 and fc2
    _, consolidation = listen(whisper)
    adapter = whisper.model.model.decoder.layers[-1].fc1

    def cost_of_changing(unit: int) -> float:
        with torch.no_grad():
            adapter.lora_A["default"].weight.fill_(1.0)
            adapter.lora_B["default"].weight.zero_()
            adapter.lora_B["default"].weight[unit] = 1.0
        return float(consolidation.penalty().detach())

    assert cost_of_changing(1) > 0
    assert cost_of_changing(0) < 1e-6 * cost_of_changing(1)


def test_listening_changes_no_weight_leaves_no_gradient_and_draws_nothing(whisper: Whisper) -> None:
    batch = make_batch(whisper, "press one", "stop")
    torch.manual_seed(3)
    model, _ = listen(whisper)
    state, drawn = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    before = TranscriptionLoss(model, whisper)(*batch)
    importance = Importance(model, whisper)
    importance.add(TranscriptionLoss(model, whisper), *batch)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(TranscriptionLoss(model, whisper)(*batch), before)


def test_the_penalty_pulls_the_adapters_back(whisper: Whisper) -> None:
    model, consolidation = listen(whisper, rank=4)
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_B["default"].weight.fill_(0.01)
    batch = make_batch(whisper, "go on")
    plain = TranscriptionLoss(model, whisper)(*batch)
    held = TranscriptionLoss(model, whisper, consolidation)(*batch)
    torch.testing.assert_close(held, plain + consolidation.penalty())
    before = float(consolidation.penalty().detach())
    consolidation.penalty().backward()
    with torch.no_grad():
        for layer in layers(model):
            weight = layer.lora_B["default"].weight
            weight -= 1e-4 * weight.grad
    assert float(consolidation.penalty().detach()) < before
