"""The 30B path: LoRA steps on vectors and text, save, reload, generate, on NemotronH at the real widths with random weights.

    python scripts/nemotron_path.py                     # layers MEM* of Nemotron-3-Nano-30B-A3B in bf16, on a CPU: 7 GB, minutes
    python scripts/nemotron_path.py --experts 16        # the same with 16 of the 128 experts: 4 GB
    python scripts/nemotron_path.py --full --batch-size 8 --facts 20 --new-tokens 128      # all 52 layers, on a GPU of 80 GB or more

The prompt is D-RAG's: per fact one vector (from a trained projector) and its text. After the steps the adapter is saved, and a new
process builds the same base model again, loads the adapter and answers the same prompts: its tokens must be the same. Needs torch,
transformers, peft, accelerate and pydantic; no checkpoint, notebook or network. Writes `figures/bench/nemotron_path_<device>.json`."""
import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from drag_lib.files import write_json  # noqa: E402
from drag_lib.llm import LLM, PRESETS, add_lora, byte_tokenizer, check_memory, from_parts, load_adapter, memory_needed, save_adapter  # noqa: E402
from drag_lib.prompts import ANSWER_HEADER, Evidence, answer_loss, build_batch, generate  # noqa: E402
from drag_lib.runs import device_name, git_state, package_versions, peak_memory  # noqa: E402

WIDTH = 768  # of a fact's vector: [head, relation, tail] of a retriever of 256


def layer_pattern(args) -> str:
    fields = PRESETS['nemotron-3-nano-30b'].fields
    return fields['hybrid_override_pattern'] if args.full else args.layers


def configuration(args):
    "The real configuration with the layers and experts asked for."
    from transformers import AutoConfig
    changed = {'hybrid_override_pattern': layer_pattern(args), 'n_routed_experts': args.experts, 'eos_token_id': 2}
    return AutoConfig.for_model(**PRESETS['nemotron-3-nano-30b'].fields | changed)


def random_llm(config, args) -> LLM:
    "The model with weights drawn from seed 0 in the asked precision, where it will stay, and a byte tokenizer."
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype={'bf16': torch.bfloat16, 'fp32': torch.float32}[args.precision])
    return from_parts(model, byte_tokenizer(), f'nemotron {layer_pattern(args)}')


def prompts(args, vectors) -> tuple[list, list[str]]:
    "D-RAG prompts of made-up facts, each with its vector, and their answers."
    made, answers = [], []
    for i in range(args.batch_size):
        facts = [Evidence([vectors[i, j:j + 1], f' film {i}, directed by, person {j}\n']) for j in range(args.facts)]
        question = f'Answer the question based on the provided facts.\nQuestion: who directed film {i}?\nFacts:\n'
        made.append([question, *facts, ANSWER_HEADER])
        answers.append(f'person {i % args.facts}')
    return made, answers


def fact_vectors(args) -> torch.Tensor:
    "[batch, facts, WIDTH], the same in every process."
    return torch.randn(args.batch_size, args.facts, WIDTH, generator=torch.Generator().manual_seed(1)).to(args.device)


def new_projector(llm: LLM, args) -> nn.Linear:
    "To vectors as large as the model's own embeddings."
    torch.manual_seed(2)
    projector = nn.Linear(WIDTH, llm.width).to(args.device)
    with torch.no_grad():
        projector.weight *= llm.embed(torch.arange(259, device=args.device)).float().std()/projector(fact_vectors(args)).std()
    return projector


def finish(args):
    if torch.device(args.device).type == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()


def train(llm: LLM, projector, args) -> dict:
    "A few LoRA steps on one batch; the first is warm-up."
    weights = [*(p for p in llm.model.parameters() if p.requires_grad), *projector.parameters()]
    optimizer = torch.optim.AdamW(weights, args.learning_rate)
    llm.model.train()
    losses, seconds = [], []
    for step in range(args.steps):
        began = finish(args)
        made, answers = prompts(args, projector(fact_vectors(args)))
        batch = build_batch(llm, made, answers)
        loss = answer_loss(llm, batch)[0].mean()
        loss.backward()
        if step == 0:
            dead = [n for n, p in llm.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
            if dead: sys.exit(f'error: no finite gradient in {dead[0]} and {len(dead) - 1} more')
            assert projector.weight.grad.abs().sum() > 0, 'the projector got no gradient'
        nn.utils.clip_grad_norm_(weights, 1.)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(finish(args) - began)
        print(f'step {step + 1}/{args.steps}: {seconds[-1]:.2f} s, loss {losses[-1]:.4f}', flush=True)
    if not losses[-1] < losses[0]: sys.exit(f'error: the loss did not fall on its own batch: {losses}')
    positions, each = int(batch.n_tokens.sum()), median(seconds[1:] or seconds)
    return {'losses': losses, 'seconds_first_step': seconds[0], 'seconds_step': each, 'positions_per_step': positions,
            'train_tokens_per_second': positions/each, 'trainable_parameters': sum(p.numel() for p in weights)}


@torch.no_grad()
def answer(llm: LLM, projector, args) -> list[list[int]]:
    "The tokens that greedy generation gives to the prompts."
    batch = build_batch(llm, prompts(args, projector(fact_vectors(args)))[0])
    return [row.tolist() for row in generate(llm, batch, max_new_tokens=args.new_tokens).ids]


@torch.no_grad()
def generation_speed(llm: LLM, projector, args) -> dict:
    "Seconds to read the prompts, and tokens a second after that, with no end before `new_tokens`; after a warm-up."
    batch = build_batch(llm, prompts(args, projector(fact_vectors(args)))[0])
    inputs = dict(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask, do_sample=False)
    for n in (2, args.new_tokens):  # the first is warm-up
        times = [finish(args)]
        def note(ids, scores):
            times.append(finish(args))
            return torch.zeros(len(ids), dtype=torch.bool, device=args.device)
        llm.model.eval().generate(**inputs, min_new_tokens=n, max_new_tokens=n, stopping_criteria=[note])
    each = median(b - a for a, b in zip(times[1:], times[2:]))
    return {'seconds_prompt': times[1] - times[0], 'seconds_per_new_token': each, 'generate_tokens_per_second': args.batch_size/each}


def reload(folder: Path, args):
    "In a new process: the base model again, the saved adapter and projector, the same prompts; prints the tokens."
    from safetensors.torch import load_file
    llm = random_llm(configuration(args), args)
    projector = new_projector(llm, args)
    projector.load_state_dict(load_file(folder/'projector.safetensors'))
    bare = answer(llm, projector, args)
    print(json.dumps({'bare': bare, 'adapter': answer(load_adapter(llm, folder), projector, args)}))


def options():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--layers', default='MEM*', help='the layers: M Mamba2, E experts, * attention')
    parser.add_argument('--full', action='store_true', help='all 52 layers (31.6 B parameters, 59 GiB in bf16)')
    parser.add_argument('--experts', type=int, default=128, help='routed experts a layer; fewer than the real 128 take less memory')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--precision', choices=('bf16', 'fp32'), default='bf16')
    for name, default in {'batch-size': 2, 'facts': 4, 'steps': 4, 'new-tokens': 16, 'rank': 16}.items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--learning-rate', type=float, default=1e-3)
    parser.add_argument('--targets', default='attention,mamba,mlp', help='groups of linear maps that get LoRA')
    parser.add_argument('--checkpointing', action=argparse.BooleanOptionalAction, default=True, help='gradient checkpointing')
    parser.add_argument('--force', action='store_true', help='go on even where the memory estimate says that it cannot fit')
    parser.add_argument('--out', type=Path, help='the JSON; default: figures/bench/nemotron_path_<device>.json')
    parser.add_argument('--reload', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not re.fullmatch('[ME*]+', args.layers): parser.error(f'--layers {args.layers}: of M, E and * only')
    if args.new_tokens < 2: parser.error('--new-tokens: at least 2')
    if args.experts < 6: parser.error('--experts: at least the 6 that a token goes to')
    return args


def main():
    args = options()
    if args.reload: return reload(args.reload, args)
    config, device, targets = configuration(args), torch.device(args.device), tuple(args.targets.split(','))
    length = 80 + 30*args.facts  # bytes of a prompt, about
    needed = memory_needed(config, precision=args.precision, batch_size=args.batch_size, n_tokens=length, training=True, rank=args.rank,
                           targets=targets, gradient_checkpointing=args.checkpointing)
    try: print(check_memory(needed, 'nemotron path', device, args.force), flush=True)
    except ValueError as e: sys.exit(f'error: {e}')
    began = time.perf_counter()
    llm = random_llm(config, args)
    built = finish(args) - began
    print(f'{llm}\nbuilt in {built:.1f} s', flush=True)
    parameters, mended, projector = llm.model.num_parameters(), llm.mended, new_projector(llm, args)
    add_lora(llm, rank=args.rank, targets=targets)
    if args.checkpointing: llm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    result = train(llm, projector, args)
    peak_training = peak_memory()
    if device.type == 'cuda': torch.cuda.reset_peak_memory_stats()
    ids, speed = answer(llm, projector, args), generation_speed(llm, projector, args)
    peak_generation = peak_memory()
    print(f'{speed["generate_tokens_per_second"]:.1f} tokens/s generated; first answer: {llm.tokenizer.decode(ids[0])!r}', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        from safetensors.torch import save_file
        save_adapter(llm, folder)
        save_file({n: t.detach().cpu().contiguous() for n, t in projector.state_dict().items()}, Path(folder)/'projector.safetensors')
        size = sum(p.stat().st_size for p in Path(folder).iterdir())
        del llm, projector  # the new process needs the memory
        gc.collect()
        if device.type == 'cuda': torch.cuda.empty_cache()
        again = subprocess.run([sys.executable, *sys.argv, '--reload', folder], stdout=subprocess.PIPE, text=True, env=os.environ)
    if again.returncode: sys.exit('error: the new process failed')
    loaded = json.loads(again.stdout.splitlines()[-1])
    same, effect = loaded['adapter'] == ids, loaded['bare'] != ids
    print(f'new process: {"the same tokens" if same else "OTHER TOKENS"}; without the adapter {"others" if effect else "THE SAME"}')
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device_name()
    short = 'cpu' if device.type == 'cpu' else re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')
    out = args.out or ROOT/'figures'/'bench'/f'nemotron_path_{short}.json'
    write_json(out, {
        'device': name, 'command': ' '.join(['python', 'scripts/nemotron_path.py', *sys.argv[1:]]), 'git': git_state(),
        'packages': package_versions(('torch', 'transformers', 'peft', 'mamba-ssm', 'causal-conv1d')), 'threads': torch.get_num_threads(),
        'weights': 'random', 'layers': layer_pattern(args), 'n_layers': len(layer_pattern(args)), 'experts': args.experts,
        'experts_of_the_real_model': 128, 'parameters': parameters, 'mended': mended,
        **{k: getattr(args, k) for k in ('precision', 'batch_size', 'facts', 'rank', 'targets', 'checkpointing', 'learning_rate', 'steps')},
        'seconds_build': built, **result, 'new_tokens': args.new_tokens, **speed, 'estimate_gib': needed,
        **{f'training/{k}': v for k, v in peak_training.items()}, **{f'generation/{k}': v for k, v in peak_generation.items()},
        'adapter_bytes': size, 'identical_after_reload': same, 'adapter_changes_tokens': effect})
    peak = peak_training.get('peak_cuda_bytes', peak_training['peak_memory_bytes'])/2**30
    print(f'{result["seconds_step"]:.2f} s a step, {result["train_tokens_per_second"]:.0f} tokens/s in training, '
          f'{speed["generate_tokens_per_second"]:.1f} in generation, peak {peak:.1f} GiB; written to {out}')
    if not (same and effect): sys.exit('error: the reloaded adapter does not give the same tokens')


if __name__ == '__main__': main()
