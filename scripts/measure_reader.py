#!/usr/bin/env python
"""Compare trained readers on the world's held-out questions: gold facts among ten distractors of the same subgraph, as plain text.

    .venv/bin/drag train reader --run reader-llama --variant llama --minutes 32 ...      once a variant, with the same minutes
    .venv/bin/drag train reader --run reader-hybrid --variant hybrid --minutes 32 ...
    .venv/bin/python scripts/measure_reader.py reader-llama reader-hybrid                writes figures/bench/reader.json
"""
import argparse
import json

from drag_lib.files import write_json
from drag_lib.llm import load_llm
from drag_lib.reader import evaluate_reader, reader_folder
from drag_lib.records import read_questions
from drag_lib.runs import device_name, git_state, project_folder

KINDS = ('1hop/', '2hop/', '3hop/', 'conjunction/', 'multi/', 'unanswerable/')


def main(runs: list[str]):
    records, path = read_questions(project_folder()/'data/world/kgqa/test.jsonl.gz'), project_folder()/'figures/bench/reader.json'
    rows = json.loads(path.read_text())['readers'] if path.exists() else {}
    for run in runs:
        folder = reader_folder(run)
        made = json.loads((folder/'manifest.json').read_text())
        llm = load_llm(str(folder), precision='fp32')
        metrics, _ = evaluate_reader(llm, records, progress=run)
        told = {k: made['config'][k] for k in ('variant', 'width', 'n_layers', 'minutes', 'learning_rate', 'seed')}
        rows[run] = {**told, 'git': git_state(), 'n_parameters': llm.model.num_parameters(), 'made': made, 'metrics': metrics}
        print(run, {kind: round(metrics[f'{kind}strict/em'], 3) for kind in ('', *KINDS)}, round(metrics['stopped'], 3), flush=True)
    write_json(path, {'data': 'world, test questions, gold facts among 10 others', 'n': len(records),
                      'command': f'scripts/measure_reader.py {" ".join(rows)}', 'device': device_name(), 'readers': rows})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='RUN')
    main(parser.parse_args().runs)
