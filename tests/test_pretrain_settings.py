"""Settings of tower and pretraining that cannot work, each refused in one line; the launch files of sequences pass."""

from dataclasses import replace
from pathlib import Path

import pytest
import toy

from pinfm_jax.checks import check_experiment
from pinfm_jax.errors import UserError
from pinfm_jax.launch import load_experiment, run_file
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.sequential import baselines, sasrec

FOLDER = Path(__file__).resolve().parent.parent / 'experiments' / 'sequential'
LAUNCH_FILES = [FOLDER / f'{name}.py' for name in ('beauty', 'ml1m', 'sports', 'toys')]


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'pretrain.item_dropout': 1.0}, 'pretrain.item_dropout is 1.0; expected a share below 1'),
    ({'model.tower.token_dropout': 1.0}, 'model.tower.token_dropout is 1.0; expected a share below 1'),
    ({'model.tower.backbone': 'hstu', 'model.tower.rotary': True}, "but model.tower.backbone 'hstu' has none"),
    ({'model.tower.attention': 'flash', 'model.tower.attention_dropout': 0.1}, 'flash kernels have none'),
    ({'model.tower.rotary': True, 'model.tower.heads': 16}, 'a head is 1 wide'),
    ({'model.tower.bare_tokens': True, 'model.tables.width': 4}, 'takes item vectors of 8'),
    ({'model.tower.bare_targets': True}, 'model.tower.output_width 8; make the three equal'),
    ({'pretrain.max_columns': 0}, 'there are no other negatives'),
    ({'pretrain.full_catalogue': True}, 'set pretrain.max_columns=0'),
    ({'pretrain.full_catalogue': True, 'pretrain.uniform_negatives': 8}, 'all items are columns already'),
    ({'pretrain.full_catalogue': True, 'pretrain.max_columns': 0, 'pretrain.log_q': 'counts'}, 'takes all'),
    ({'pretrain.count_as': 8, 'pretrain.uniform_negatives': 16}, 'set pretrain.max_columns=0, pretrain.log_q=none'),
    (
      {
        'pretrain.count_as': 8, 'pretrain.max_columns': 0, 'pretrain.full_catalogue': True,
        'pretrain.keep_positives': True,
      },
      'set pretrain.keep_positives=false',
    ),
    ({'pretrain.negative_power': 0.5}, 'nothing is drawn'),
    (
      {'pretrain.negative_power': 0.5, 'pretrain.uniform_negatives': 8, 'pretrain.log_q': 'sketch'},
      'draws by exact counts',
    ),
    ({'pretrain.keep_positives': True}, 'every target of the batch its own negative'),
    (
      {
        'pretrain.keep_positives': True, 'pretrain.full_catalogue': True, 'pretrain.max_columns': 0,
        'model.content': True, 'model.id_mask': 0.1,
      },
      'set model.id_mask=0',
    ),
    ({'pretrain.bce_calibration': 0.5}, 'the loss is a softmax'),
    ({'pretrain.bce_calibration': 1.5, 'pretrain.bce_negatives': 1}, 'expected at most 1'),
    ({'pretrain.bce_negatives': 1, 'pretrain.log_q': 'counts'}, 'are of the softmax'),
    ({'pretrain.update.table_rule': 'adam', 'model.tables.dtype': 'bfloat16'}, "'adam', which keeps"),
    ({'pretrain.ema_decay': 1.0}, 'expected below 1'),
    ({'pretrain.ema_tables': True}, 'nothing is averaged'),
    ({'pretrain.ema_tables': True, 'pretrain.ema_decay': 0.9, 'model.tables.dtype': 'bfloat16'}, 'averages float32'),
    ({'data.held_out_events': 3}, r'expected 1 \(test\) or 2'),
    ({'data.held_out_events': 2, 'pretrain.continue_from': 'x'}, 'set data.held_out_events=1'),
    ({'pretrain.eval_ranking': True, 'pretrain.eval_every': 1}, 'only the test event is held out'),
    ({'pretrain.eval_ranking': True, 'data.held_out_events': 2}, 'eval_ranking is True, but nothing'),
    ({'pretrain.eval_metric': 'hr@5'}, 'expected one of: ndcg@10, hr@10, mrr'),
    ({'pretrain.eval_metric': 'mrr'}, 'no ranking is measured'),
    ({'pretrain.patience': 2}, 'pretrain.patience is 2, but nothing is measured'),
    ({'model.tables.hash_seed': -2}, 'model.tables.hash_seed is -2'),
  ],
)  # fmt: skip
def test_what_cannot_work_is_refused(changes, words):
  with pytest.raises(UserError, match=words) as caught:
    check_experiment(apply_overrides(toy.EXPERIMENT, changes))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('path', LAUNCH_FILES, ids=lambda path: path.stem)
def test_a_launch_file_and_its_baselines_pass(path):
  experiment = load_experiment(path)
  arms = baselines(experiment)
  assert [arm.name for arm in arms] == ['PinFM', 'SASRec+SS', 'SASRec+SS, 2 blocks', 'SASRec', 'gSASRec']
  for arm in arms:
    check_experiment(apply_overrides(experiment, arm.overrides))
  own = apply_overrides(experiment, arms[1].overrides)
  assert (own.model.tower.layers, own.model.tower.heads, own.model.tower.width) == (1, 1, 64)
  assert (own.pretrain.uniform_negatives, own.pretrain.count_as) == (2048, 256)
  assert own.data == experiment.data
  for change in run_file(FOLDER / 'search.py', 'file')['OURS'].values():
    tuned = apply_overrides(experiment, change)
    assert apply_overrides(tuned, sasrec(tuned)) == own  # the baseline stays
  blocks = apply_overrides(experiment, arms[2].overrides)
  assert blocks.model.tower.dropout == blocks.model.tower.attention_dropout == blocks.pretrain.item_dropout == 0.1
  larger = apply_overrides(experiment, arms[-1].overrides)
  assert (larger.model.tower.layers, larger.model.tower.width, larger.pretrain.bce_calibration) == (2, 128, 0.75)
  assert (blocks.model.tower.backbone, larger.model.tower.backbone) == ('padded_sasrec', 'sasrec')


@pytest.mark.parametrize('path', LAUNCH_FILES, ids=lambda path: path.stem)
def test_the_search_spends_the_same_on_both_models(path):
  experiment, search = load_experiment(path), run_file(FOLDER / 'search.py', 'file')
  arms = search['arms'](experiment)
  check_experiment(replace(experiment, arms=arms, baseline=search['baseline']), towers_alone=True)
  assert [arm.name.split(',')[0] for arm in arms] == ['PinFM', 'SASRec+SS'] * (len(arms) // 2)
  tried = [apply_overrides(experiment, arm.overrides) for arm in arms]
  assert all(one != other for i, one in enumerate(tried) for other in tried[:i])
  assert all(apply_overrides(experiment, change) in tried for change in search['OURS'].values())
  published = sasrec(experiment)
  assert all(apply_overrides(experiment, {**published, **change}) in tried for change in search['SASREC'].values())
