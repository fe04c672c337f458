"""Each loss equals TRL's own function; TRL's ORPOTrainer with our loss gives our numbers."""

import json
import re
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_pairs, save_tiny, tiny_model
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import asft
from data import pack

# An accelerate.Accelerator of one process.
ALONE = SimpleNamespace(device=torch.device("cpu"))
ALONE.gather = ALONE.gather_for_metrics = lambda x: x
LENGTHS_W, LENGTHS_L = torch.tensor([3, 17, 1, 40, 8, 2]), torch.tensor([5, 9, 2, 61, 30, 1])


def bare(trainer: type, **attributes):
    """A trainer that has only the attributes that its loss reads."""
    made = object.__new__(trainer)
    made.__dict__.update(accelerator=ALONE, **attributes)
    return made


def trl_orpo_align(w, l, beta):
    return -bare(ORPOTrainer, beta=beta).odds_ratio_loss(w, l)[0]


def trl_simpo(w, l, beta, gamma):
    options = dict(beta=beta, simpo_gamma=gamma, alpha=0.0, label_smoothing=0.0)
    return bare(CPOTrainer, loss_type="simpo", **options).cpo_loss(w, l)[0]


def trl_dpo(kind, sum_w, sum_l, ref_w, ref_l, beta):
    """DPOTrainer's loss of each pair; the pretended model puts a response's sum on one token."""
    options = dict(beta=beta, loss_types=[kind], loss_weights=[1.0], label_smoothing=0.0)
    options |= dict(f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, ld_alpha=None)
    options |= dict(precompute_ref_logps=True, aux_loss_enabled=False, use_weighting=False)
    options |= dict(_metrics=defaultdict(lambda: defaultdict(list)))
    options |= dict(model=SimpleNamespace(training=True), _total_train_tokens=0, _tp_size=1)
    trainer, losses = bare(DPOTrainer, **options), []
    for i in range(len(sum_w)):
        lengths = torch.stack([LENGTHS_W[i], LENGTHS_L[i]])
        width = int(lengths.max())
        mask = torch.zeros(2, width + 1, dtype=torch.long)
        mask[:, 1:] = torch.arange(width) < lengths[:, None]
        nothing = torch.zeros(2, width)
        first = nothing.clone()
        first[:, 0] = 1
        output = SimpleNamespace(entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
        output.log_probs = torch.stack([sum_w[i], sum_l[i]])[:, None] * first
        batch = dict(input_ids=torch.zeros_like(mask), attention_mask=torch.ones_like(mask))
        batch |= dict(completion_mask=mask, ref_chosen_logps=ref_w[i : i + 1])
        batch |= dict(ref_rejected_logps=ref_l[i : i + 1])
        losses.append(trainer._compute_loss(lambda output=output, **_: output, batch, False))
    return torch.stack(losses)


def random_logps():
    """Mean log-probs of chosen, rejected and their references, and the sums."""
    generator = torch.Generator().manual_seed(0)
    means = [-torch.empty(6).uniform_(0.05, 4, generator=generator) for _ in range(4)]
    lengths = (LENGTHS_W, LENGTHS_L) * 2
    return means, [mean * length for mean, length in zip(means, lengths, strict=True)]


def assert_same(ours, theirs, *inputs):
    """Values and gradients within 1e-6, relative to the largest."""
    found = (ours, *torch.autograd.grad(ours.sum(), inputs, retain_graph=True))
    expected = (theirs, *torch.autograd.grad(theirs.sum(), inputs))
    for a, b in zip(found, expected, strict=True):
        largest = max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * largest)


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_align_term_of_orpo_is_trls(beta):
    w, l = leaves(*random_logps()[0][:2])
    ours, metrics = asft.orpo_loss(w, l, beta=beta)
    # TRL's SFT term pools all tokens of the batch; ours is each response's own mean.
    assert_same(ours, -w + trl_orpo_align(w, l, beta), w, l)
    torch.testing.assert_close(beta * metrics["align"], trl_orpo_align(w, l, beta).detach())


@pytest.mark.parametrize("beta, gamma", [(2.0, 1.0), (2.5, 0.3)])
def test_simpo_is_trls_without_its_sft_term(beta, gamma):
    w, l = leaves(*random_logps()[0][:2])
    ours, _ = asft.simpo_loss(w, l, beta=beta, gamma=gamma)
    assert_same(ours, trl_simpo(w, l, beta, gamma), w, l)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_trls(beta):
    sums = random_logps()[1]
    w, l = leaves(*sums[:2])
    ours, _ = asft.dpo_loss(w, l, *sums[2:], beta=beta)
    assert_same(ours, trl_dpo("sigmoid", w, l, *sums[2:], beta), w, l)


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_dpo_of_means_is_trls_length_normalised_dpo(beta):
    means, sums = random_logps()
    w, l = leaves(*sums[:2])
    function = asft.LOSSES["dpo-norm"].function
    ours, _ = function(w / LENGTHS_W, l / LENGTHS_L, *means[2:], beta=beta)
    assert_same(ours, trl_dpo("sigmoid_norm", w, l, *sums[2:], beta), w, l)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo_of_means_is_trls(beta):
    means, sums = random_logps()
    w, l = leaves(*sums[:2])
    ours, _ = asft.ipo_loss(w / LENGTHS_W, l / LENGTHS_L, *means[2:], beta=beta)
    assert_same(ours, trl_dpo("ipo", w, l, *sums[2:], beta), w, l)


def documented_trainer(name: str) -> type:
    """The subclass of TRL's or transformers' trainer that the documentation shows."""
    texts = [path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))]
    (code,) = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", "\n".join(texts), re.S)
    scope: dict = {}
    exec(code, scope)
    return scope["ASFTTrainer"]


def test_trls_orpo_trainer_with_our_loss_gives_the_loss_and_gradients_of_our_packed_path(tmp_path):
    ours = tiny_model(std=0.3)
    save_tiny(tmp_path / "model", std=0.3)
    pairs = random_pairs([(5, 7, 4), (9, 3, 8), (2, 12, 6), (7, 5, 5)], vocab_size=90)
    for pair in pairs:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            ids += 3
        pair.prompt[0], pair.chosen[-1], pair.rejected[-1] = 0, 1, 1
    # Each token is a word, so that TRL's own tokenisation gives these ids.
    # 0 begins a prompt, 1 ends a response.
    texts = [
        [" ".join(f"<{i}>" for i in ids) for ids in (pair.prompt, pair.chosen, pair.rejected)]
        for pair in pairs
    ]
    rows = [dict(prompt=x, chosen=" " + w, rejected=" " + l) for x, w, l in texts]
    vocabulary = {f"<{i}>": i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="none"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(bos_token="<0>", eos_token="<1>", pad_token="<2>")
    options = dict(per_device_train_batch_size=4, beta=0.3, max_length=64, report_to="none")
    options |= dict(use_cpu=True, bf16=False, train_sampling_strategy="sequential")
    options |= dict(activation_checkpointing=False, output_dir=str(tmp_path / "out"))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    trainer = documented_trainer("trl")(
        model=theirs,
        args=ORPOConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
    )
    (batch,) = trainer.get_train_dataloader()
    for i, pair in enumerate(pairs):
        for side in ("chosen", "rejected"):
            whole = [*pair.prompt.tolist(), *getattr(pair, side).tolist()]
            assert batch[f"{side}_input_ids"][i][: len(whole)].tolist() == whole
    loss, metrics = trainer.get_batch_loss_metrics(theirs, batch)
    loss.backward()

    mean_R, _ = ours(pack(pairs))
    losses, _ = asft.asft_loss(mean_R[0::2], mean_R[1::2], beta=0.3)
    losses.mean().backward()
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    margin = (mean_R[0::2] - mean_R[1::2]).mean().item()
    assert metrics["margin"].item() == pytest.approx(margin, rel=1e-4)
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        largest = float(parameter.grad.abs().max())
        options = dict(rtol=1e-4, atol=1e-5 * largest, msg=key)
        torch.testing.assert_close(gradients[key], parameter.grad, **options)
    assert json.dumps({name: float(value) for name, value in metrics.items()})


def test_transformers_trainer_with_our_loss_gives_our_gradients_also_if_it_accumulates(tmp_path):
    ours = tiny_model(std=0.3)
    save_tiny(tmp_path / "model", std=0.3)
    pairs = random_pairs([(5, 7, 4), (9, 3, 8), (2, 12, 6), (7, 5, 5)], vocab_size=90)
    mean_R, _ = ours(pack(pairs))
    losses, _ = asft.asft_loss(mean_R[0::2], mean_R[1::2], beta=0.1)
    losses.mean().backward()
    expected = dict(ours.named_parameters())

    def collate(rows: list) -> dict[str, torch.Tensor]:
        """Chosen answers, then rejected ones, padded on the right."""
        rows = [(row["pair"], side) for side in ("chosen", "rejected") for row in rows]
        tokens, labels = [], []
        for pair, side in rows:
            answer = torch.tensor(getattr(pair, side))
            prompt = torch.tensor(pair.prompt)
            tokens.append(torch.cat([prompt, answer]))
            labels.append(torch.cat([torch.full_like(prompt, -100), answer]))
        padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        labels_RT = padded(labels, padding_value=-100).long()
        mask_RT = padded([torch.ones_like(x) for x in tokens])
        return dict(input_ids=padded(tokens).long(), attention_mask=mask_RT, labels=labels_RT)

    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_, model, **__):
            found.update({key: x.grad.clone() for key, x in model.named_parameters()})

    for accumulated in (1, 2, 4):
        found.clear()
        options = dict(gradient_accumulation_steps=accumulated, max_steps=1, max_grad_norm=0.0)
        options |= dict(per_device_train_batch_size=4 // accumulated, remove_unused_columns=False)
        options |= dict(use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
        documented_trainer("transformers")(
            model=LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32),
            args=TrainingArguments(output_dir=str(tmp_path / "out"), **options),
            train_dataset=[{"pair": pair} for pair in pairs],
            data_collator=collate,
            callbacks=[Keep()],
        ).train()
        assert found.keys() == expected.keys()
        for key, parameter in expected.items():
            largest = float(parameter.grad.abs().max())
            options = dict(rtol=1e-4, atol=1e-5 * largest, msg=f"{key}, {accumulated}")
            torch.testing.assert_close(found[key], parameter.grad, **options)
