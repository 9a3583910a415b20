"""Claim: a layer of transformers is replaced only while its code and its parts are those that were read; what the model
does around it (recording, checkpointing, caches, compiling) goes on; the rest is a reason or an error."""

import copy
import importlib

import pytest
import torch
from torch import nn

import macaron_ops
from macaron_ops.integrations import replace, unfused
from tests.integrations.compare import loss_and_grads
from tests.integrations.tiny_models import MODELS, keep_float64, tiny

transformers = pytest.importorskip("transformers")

WHOLE = ("distilbert", "vit", "whisper")  # the attention is fused, too
FFN = ("gpt2", "llama", "wav2vec2_conformer", "wav2vec2_bert", "seamless_m4t_v2", "parakeet", "nemotron", "lasr")
FFN += ("granite_speech", "phi4_audio", "gemma3n_audio", "gemma4_audio")


def fused_layers(model: nn.Module) -> list[nn.Module]:
    assert len(macaron_ops.replace_layers(model).replaced) > 0
    return [m for m in model.modules() if hasattr(m, "replaced_class")]


@pytest.mark.parametrize("name", WHOLE + FFN)
def test_a_part_that_has_to_be_called_is_never_skipped(name):
    """Each submodule that is read, with a hook: before, the layer is left; later, its call is an error."""
    model, inputs = tiny(name).eval(), MODELS[name].inputs()
    layer = fused_layers(model)[0]
    paths = [part.path for part in layer.parts]
    assert len(paths) >= 3
    for path in paths:
        hook = layer.get_submodule(path).register_forward_hook(print)
        with pytest.raises(RuntimeError, match=f"{path} has a hook, print, .*replace_layers"), torch.no_grad():
            model(**inputs)
        (left,) = macaron_ops.replace_layers(layer).left
        assert left.reason == f"{path} has a hook, print, which would be skipped"
        hook.remove()
        assert len(macaron_ops.replace_layers(layer).replaced) == 1


@pytest.mark.parametrize("name", WHOLE + FFN)
def test_code_that_changed_is_left_with_the_reason(name, monkeypatch):
    model = tiny(name)
    layers = fused_layers(model)[0].layers
    macaron_ops.restore_layers(model)
    version = transformers.__version__
    for part in layers.code:
        monkeypatch.setitem(layers.code, part, ("another code",))
        reasons = {left.reason for left in macaron_ops.replace_layers(model).left}
        cls = part.replace("*", MODELS[name].layer.removesuffix(layers.suffix))
        assert reasons == {f"the code of {cls} in transformers {version} is not one that is known"}
        monkeypatch.undo()
    monkeypatch.setattr(layers, "forwards", {"another code": object})
    reasons = {left.reason for left in macaron_ops.replace_layers(model).left}
    assert reasons == {f"the code of {MODELS[name].layer} in transformers {version} is not one that is known"}


@pytest.mark.parametrize("name", WHOLE + FFN)
def test_every_dropout_is_where_it_was(name, monkeypatch):
    """One after the other is 1, the others are 0: what it drops is gone in both, and no number is random."""
    keep_float64(monkeypatch)
    model = tiny(name, "eager" if name in WHOLE else None).double().train()
    inputs = {k: v.double() if getattr(v, "is_floating_point", bool)() else v for k, v in MODELS[name].inputs().items()}
    layer = fused_layers(model)[0]
    macaron_ops.restore_layers(model)
    settings = [
        (module, attribute)
        for path, module in layer.named_modules()
        for attribute, value in vars(module).items()
        if name in WHOLE or not path.startswith(("attn", "self_attn", "conv"))
        if attribute in ("p", "dropout", "attention_dropout", "activation_dropout") and isinstance(value, (int, float))
    ]
    before = model(**inputs)[0]
    moved = 0
    for module, attribute in settings:
        setattr(module, attribute, 1.0)
        expected = model(**inputs)[0]
        macaron_ops.replace_layers(model)
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-6)
        macaron_ops.restore_layers(model)
        setattr(module, attribute, 0.0)
        moved += not torch.equal(expected, before)
    assert moved > 0 or name in ("gemma3n_audio", "gemma4_audio", "llama")  # which have none


@pytest.mark.parametrize("name", ("vit", "gpt2", "llama", "wav2vec2_bert", "parakeet"))
def test_hidden_states_are_recorded(name):
    model, inputs = tiny(name).eval(), MODELS[name].inputs()
    expected = model(**inputs, output_hidden_states=True).hidden_states
    macaron_ops.replace_layers(model)
    actual = model(**inputs, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == 3
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", ("gpt2", "llama", "wav2vec2_bert", "parakeet"))
def test_attention_that_stays_gives_its_weights(name):
    model, inputs = tiny(name, "eager").eval(), MODELS[name].inputs()
    expected = model(**inputs, output_attentions=True).attentions
    macaron_ops.replace_layers(model)
    actual = model(**inputs, output_attentions=True).attentions
    assert len(actual) == len(expected) == 2
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", WHOLE)
def test_attention_that_is_fused_refuses_to_give_weights(name):
    model, inputs = tiny(name, "eager").eval(), MODELS[name].inputs()
    macaron_ops.replace_layers(model)
    with pytest.raises(ValueError, match="output_attentions: expected None or False"):
        model(**inputs, output_attentions=True)


@pytest.mark.parametrize("name", WHOLE)
def test_an_attention_whose_masks_are_unknown_is_left(name):
    model = tiny(name)
    model.config._attn_implementation = "flex_attention"
    reasons = {left.reason for left in macaron_ops.replace_layers(model).left}
    assert reasons == {"attn_implementation 'flex_attention': the masks of 'sdpa' and 'eager' are known"}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", ("vit", "llama", "wav2vec2_bert", "parakeet"))
def test_gradient_checkpointing(name):
    model, inputs = tiny(name).train(), MODELS[name].inputs()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    macaron_ops.replace_layers(model)
    results = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        results.append(loss_and_grads(model, lambda m: m(**inputs)[0]))
    (y, grads), (y_checkpointed, grads_checkpointed) = results
    assert torch.equal(y, y_checkpointed)
    assert grads.keys() == grads_checkpointed.keys()
    assert all(torch.equal(grads[name], grads_checkpointed[name]) for name in grads)


@pytest.mark.parametrize("name", ("vit", "llama"))
def test_a_model_compiles_without_a_graph_break(name):
    model, inputs = tiny(name).eval(), MODELS[name].inputs()
    macaron_ops.replace_layers(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize(("name", "head"), [("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaForCausalLM")])
def test_generation_with_a_cache(name, head, tmp_path):
    spec = MODELS[name]
    config = getattr(transformers, spec.config)(**spec.settings)
    model = getattr(transformers, head)(config).eval()
    ids = torch.randint(5, 50, (2, 9))
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **call)
    macaron_ops.replace_layers(model)
    assert torch.equal(model.generate(ids, **call), expected)
    model.save_pretrained(tmp_path)
    unpatched = getattr(transformers, head).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(unpatched(ids).logits, model(ids).logits)


def test_few_tokens_of_a_llama_run_its_own_modules_and_many_the_fused_step():
    model = tiny("llama").eval()
    twin = copy.deepcopy(model)
    macaron_ops.replace_layers(twin)
    few, many = (torch.randint(5, 50, (2, tokens)) for tokens in (63, 64))
    with torch.no_grad():
        assert torch.equal(twin(few)[0], model(few)[0])
        assert not torch.equal(twin(many)[0], model(many)[0])
        torch.testing.assert_close(twin(many)[0], model(many)[0])


def test_adapters_keep_their_ffn():
    model = tiny("wav2vec2_bert")
    before = [type(m) for m in model.adapter.modules()] + [type(m) for m in model.intermediate_ffn.modules()]
    report = macaron_ops.replace_layers(model)
    assert [r.name for r in report.replaced] == ["encoder.layers.0", "encoder.layers.1"]
    assert [type(m) for m in model.adapter.modules()] + [type(m) for m in model.intermediate_ffn.modules()] == before


def test_an_activation_without_a_fused_form_is_left():
    for name, setting in (("vit", "hidden_act"), ("llama", "hidden_act"), ("parakeet", "hidden_act")):
        reasons = {left.reason for left in macaron_ops.replace_layers(tiny(name, **{setting: "quick_gelu"})).left}
        assert len(reasons) == 1 and reasons.pop().endswith("activation QuickGELUActivation has no fused form")


def test_a_fused_class_whose_code_is_unknown_does_not_load(monkeypatch):
    from macaron_ops.integrations import vit

    monkeypatch.setattr(vit._LAYERS, "forwards", {})
    monkeypatch.delitem(vars(vit), "FusedViTLayer", raising=False)
    with pytest.raises(AttributeError, match="FusedViTLayer: the code of ViTLayer in transformers"):
        _ = vit.FusedViTLayer


def test_the_names_of_families_are_unique():
    names = [family.name for family in replace.FAMILIES]
    assert len(names) == len(set(names))
    assert len(replace._FAMILY_OF) == sum(len(family.layers) for family in replace.FAMILIES)


def test_gemma4_with_clipped_linears_is_left():
    model = tiny("gemma4_audio", use_clipped_linears=True)
    report = macaron_ops.replace_layers(model)
    assert not report.replaced and {left.reason for left in report.left} == {
        "use_clipped_linears: a clamp between the products and the activation is not fused"
    }


_MIXTURE = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
_MIXTURE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        ("MixtralConfig", {**_MIXTURE, "num_local_experts": 2}, "its FFN is a mixture of experts, "),
        (
            "Qwen3MoeConfig",
            {**_MIXTURE, "num_experts": 2, "moe_intermediate_size": 8},
            "its FFN is a mixture of experts, ",
        ),
        (
            "FastSpeech2ConformerConfig",
            {"hidden_size": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_linear_units": 40}
            | {"decoder_linear_units": 40, "vocab_size": 20},
            "its FFN is two convolutions ",
        ),
    ],
)
def test_what_only_looks_alike_is_left_with_the_reason(config, settings, reason):
    config = getattr(transformers, config)(**settings)
    model = transformers.AutoModel.from_config(config).eval()
    classes = [type(m) for m in model.modules()]
    report = macaron_ops.replace_layers(model)
    assert not report.replaced and len(report.left) == 2
    assert all(left.reason.startswith(reason) for left in report.left)
    with pytest.raises(ValueError, match=f"(?s)strict: expected .*{reason}"):
        macaron_ops.replace_layers(model, strict=True)
    assert [type(m) for m in model.modules()] == classes


def test_the_layers_that_are_left_are_there():
    for name in unfused.FAMILY.layers:
        module, _, cls = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), cls), nn.Module)
