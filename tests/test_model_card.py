"""The model card states the run's facts, and says what it does not know."""

from dataclasses import replace

import pytest

from pinfm_jax.serve.model_card import DataFacts, ModelFacts, model_card

DAY = 86_400_000
DATA = DataFacts(
  source='the feed of Mars',
  licence='CC BY-SA 4.0',
  notes='Dust was removed.',
  checksum='abc123',
  counts={'users': 1234, 'events': 5_000_000},
  days={'fine-tuned on the requests of': (0, 3 * DAY), 'test requests': (3 * DAY, 4 * DAY), 'validation': (5, 5)},
  actions=('click', 'save'),
  surfaces=(),
  labels=('click',),
  features=tuple(f'feature_{i}' for i in range(50)),
)
MODEL = ModelFacts(
  name='mars',
  arm='with PinFM',
  seed=3,
  version='9.8.7',
  storage='int4',
  parameters={'ranker': 1000, 'item tables': 20_000},
  sizes={'tower': 'gpt2, 2 layers'},
  pretraining={'steps': 12_345, 'positive_actions': ('click', 'save')},
  finetuning={'epochs': 2.5, 'label_weights': {'click': 0.5}},
  utility={'click': 1.0, 'hide': -2.0},
  catalogue=4321,
  rounding='down',
)
RESULTS = '### AUC\n\n| | click |\n| --- | ---: |\n| with PinFM | 0.7001 [+1.0, +2.0] |\n\n\n\nNote.\n'


def test_it_states_the_facts():
  card = model_card(DATA, MODEL, RESULTS, 'test', 1)
  for fact in (
    '# Model card: mars, with PinFM', '9.8.7', 'seed 3', 'the feed of Mars. Dust was removed.', 'Terms: CC BY-SA 4.0.',
    '1,234 users, 5,000,000 events', 'Fine-tuned on the requests of: 1970-01-01 to 1970-01-03 (UTC).',
    'Test requests: 1970-01-04 (UTC).', 'Surfaces: none.', 'feature_39 and 10 more', '`abc123`',
    'Tower: gpt2, 2 layers.',
    'ranker 1,000, item tables 20,000; 21,000 in all',
    'stored as int4, converted after training, rounded down.', 'click +1, hide -2', '4,321 items',
    'steps 12,345, positive_actions click/save', 'epochs 2.5, label_weights click=0.5', '| with PinFM | 0.7001',
    'on the test split over 1 seed,', 'One training run was measured', 'pinfm recommend',
    'whose terms (CC BY-SA 4.0) decide',
  ):  # fmt: skip
    assert fact in card, fact
  assert 'Validation' not in card
  assert '\n\n\n' not in card
  assert 'None' not in card


def test_what_is_not_known_is_said():
  card = model_card(
    replace(DATA, licence=None, notes=''), replace(MODEL, catalogue=None, pretraining={}), '', 'test', 1
  )
  for fact in ('Terms: none stated', 'whose terms (none stated)', 'has not been evaluated', 'Pretraining: none.'):
    assert fact in card, fact
  assert 'recommend BUNDLE' not in card
  assert 'None' not in card


@pytest.mark.parametrize('seeds', [1, 3])
def test_several_seeds_lift_a_limit(seeds):
  card = model_card(DATA, MODEL, RESULTS, 'validation', seeds)
  assert ('One training run was measured' in card) == (seeds == 1)
  assert (f'on the validation split over {seeds} seed' in card) is True


def test_a_ranker_alone():
  card = model_card(DATA, replace(MODEL, storage=None, catalogue=None), RESULTS, 'test', 1)
  assert 'without a user-sequence module' in card
  for word in ('stored as', 'float32 tables', 'id vector'):
    assert word not in card
