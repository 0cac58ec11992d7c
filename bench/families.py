"""Which model families of the installed transformers work here: bench/results/families.md.

    python bench/families.py

Every family with a causal language model is built small and at random from its default configuration. Checked: the stand-in
of the preflight; the residual stream after each block but the last against `output_hidden_states`; the logits that are
computed from it against the model's own. A family that fails is listed with the reason.
"""
import multiprocessing
import re
import resource
import sys
import warnings
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import experiment as E  # noqa: E402

# Sizes that a small model of most families takes; each is set where the configuration has it.
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             vocab_size=256, max_position_embeddings=64, ffn_dim=96, word_embed_proj_dim=64, d_model=64, n_embd=64, n_layer=4,
             n_head=4, n_positions=64, num_layers=4, num_heads=4, rotary_dim=4, num_local_experts=4, num_experts=4, moe_intermediate_size=32,
             n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
             v_head_dim=16, n_group=1, topk_group=1, mamba_n_heads=8, mamba_d_head=16, mamba_expand=2, state_size=8, time_step_rank=4,
             attention_hidden_size=64, query_pre_attn_scalar=16, hidden_size_per_layer_input=0,
             sliding_window=8, bos_token_id=0, eos_token_id=0, pad_token_id=0)
OTHERS = {"gpt_neo": {"attention_types": [[["global", "local"], 2]]}}  # sizes of one family
SECONDS = 20  # for one family
IDS = torch.arange(1, 13).repeat(2, 1)


def small(kind):
    """Returns a small configuration of a class, as far as it takes the sizes of SMALL."""
    plain = kind()
    text = plain.get_text_config()
    names = set(text.to_dict()) | set(getattr(text, "attribute_map", {}))
    sizes = {name: value for name, value in SMALL.items() if name in names} | OTHERS.get(kind.model_type, {})
    config = type(text)(**sizes) if type(text) is kind else plain.get_text_config()
    return config if type(text) is kind else type(text)(**sizes)


def hidden_states_agree(model):
    """Returns whether the stream after each block but the last is what the model itself reports."""
    states = model(IDS, output_hidden_states=True).hidden_states
    depth = len(E.find_blocks(model))
    if states is None or len(states) != depth + 1:
        return None
    streams = [E.residual_after(model, i, IDS) for i in range(depth - 1)]
    return any(all(torch.allclose(stream, states[i + first], rtol=1e-3, atol=1e-4) for i, stream in enumerate(streams))
               for first in (1, 0))  # some families report the embedding first, some do not


@torch.no_grad()
def verdict(kind):
    """Returns "works", or why a family does not."""
    config = small(kind)
    E.stand_in(config)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    agree = hidden_states_agree(model)
    if agree is False:
        return "the stream that is read is not what it reports"
    own, layer = model(IDS).logits, len(E.find_blocks(model)) // 2 - 1
    stream = E.residual_after(model, layer, IDS)
    if not torch.allclose(E.logits_from(model, layer, stream, IDS), own, rtol=1e-3, atol=1e-4):
        return "logits from the stream are not the model's own: a later block reads more than the stream"
    if torch.allclose(E.logits_from(model, layer, torch.randn_like(stream), IDS), own, rtol=1e-3, atol=1e-4):
        return "another stream changes nothing"
    return "works" if agree else "works (it reports no hidden states to compare with)"


def tell(kind, answers):
    """Puts a family's verdict into a queue; its default may be too large for a laptop."""
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2 ** 30, 12 * 2 ** 30))
    try:
        answers.put(verdict(kind))
    except BaseException as error:
        text = re.sub(r"^MODEL_NAME = '[^']*'( \([\w-]+\))?:? ", "", " ".join(str(error).split())).split(" Families that work")[0]
        answers.put(text[:200] if isinstance(error, E.RunnerError) else f"{type(error).__name__}: {text[:160]}")


def main():
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    E.MODEL_NAME, rows = "a small random model", []
    for kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        answers = multiprocessing.Queue()
        process = multiprocessing.Process(target=tell, args=(kind, answers), daemon=True)
        process.start()
        try:
            found = answers.get(timeout=SECONDS)
        except Exception:
            found = f"not done within {SECONDS} s: its default configuration is too large to be made small by these sizes"
        process.kill()
        process.join()
        rows.append((kind.model_type, found))
        print(*rows[-1], flush=True)

    good = sorted({name for name, found in rows if found.startswith("works")})
    bad = sorted({row for row in rows if row[0] not in good})
    lines = [f"Of {len(good) + len(bad)} families of transformers {transformers.__version__} that have a causal language model,",
             f"{len(good)} work, built small from their default configurations (`python bench/families.py`):", "",
             ", ".join(good) + ".", "", "Not shown to work; some only need other sizes than the small ones here:", "",
             "| family | why |", "|---|---|", *(f"| {name} | {found.replace('|', ' ')} |" for name, found in bad)]
    (ROOT / "bench" / "results" / "families.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
