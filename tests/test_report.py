"""The report of finished, unfinished and damaged runs: offline, escaped, saying what is missing."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from pinfm_jax import markup, plots
from pinfm_jax.config import EvaluateConfig, Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.report import write_report

VOID = {'meta', 'link', 'img', 'br', 'hr', 'input'}


class Page(HTMLParser):
  """Checks that every element is closed in order; collects what a browser would load, ids, and the text."""

  def __init__(self, text):
    super().__init__()
    self.open, self.loads, self.ids, self.text = [], [], [], ''
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.loads += [value for name, value in attrs if name in ('src', 'href', 'xlink:href', 'srcset', 'data')]
    self.ids += [value for name, value in attrs if name == 'id']
    assert tag not in ('script', 'iframe', 'object', 'embed')
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def made_run(workdir, finished=True):
  experiment = Experiment('a <b>&', seeds=(0, 1), evaluate=EvaluateConfig(main_label='save', utility={'hide': -1.0}))
  workdir.mkdir()
  (workdir / 'experiment.json').write_text(json.dumps(asdict(experiment)))
  for seed in (0, 1) if finished else (0,):
    for stage in ('pretrain', 'ranker_without_pinfm', 'ranker_with_pinfm'):
      directory = workdir / f'seed{seed}' / stage
      directory.mkdir(parents=True)
      rows = [
        {'step': s, 'time': 1e9 + s, 'loss': 1 / s, 'examples_per_s': 100.0, 'data_wait_share': 0.25}
        for s in range(20, 201, 20)
      ]
      (directory / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
      if finished:
        (directory / 'results.json').write_text('{}')
  if finished:
    figures = {'with PinFM/save/auc/mean': 0.75}
    ages = ('save/age<24h/auc', 'save/age>=24h/auc', 'save/unseen/auc')
    for name in ('save/auc', *ages, 'hide/age<24h/hit@3', 'rare/age<24h/auc'):
      figures[f'with PinFM/lift/{name}'] = 0.0231
      if 'rare' not in name:  # too few positives: no interval
        figures |= {f'with PinFM/lift/{name}/low': 0.011, f'with PinFM/lift/{name}/high': 0.0352}
    (workdir / 'results.json').write_text(json.dumps(figures))
    curves = {'with PinFM': [[0.1, 0.2, 50.0], [0.4, 0.3, 50.0]], '<i>none': []}
    (workdir / 'reliability.json').write_text(json.dumps({'label': 'save', 'arms': curves}))
    (workdir / 'results.md').write_text(
      '# a <b>&\n\nData: x.\n\n### AUC\n\n|  | save |\n| --- | ---: |\n| <i>arm | 0.75 |\n'
    )
  return workdir


def read(workdir):
  path = write_report(workdir)
  assert path == workdir / 'report.html'
  text = path.read_text()
  return text, Page(text)


def test_a_finished_run_has_every_part_and_loads_nothing(tmp_path):
  text, page = read(made_run(tmp_path / 'run'))
  assert all(value.startswith('#') for value in page.loads)
  assert not re.search(r'url\((?!#)|@import|<link|javascript:', text)
  assert len(page.ids) == len(set(page.ids))
  titles = re.findall('<h2>(.*?)</h2>', text)
  assert titles == ['Results', 'Lift by item age', 'Calibration', 'Learning curves', 'Training speed', 'Details']
  assert 'Not there yet' not in text
  assert 'unseen' in page.text
  assert text.count('<svg') == 2 + 1 + 2 * 3  # save by age, hide by age; calibration; loss and speed of three stages
  assert '+2.31 % [+1.10, +3.52]' in page.text
  assert 'hide (lower is better)' in page.text
  assert '25.0 %' in page.text  # share of time waiting for data
  assert 'currentColor' in text
  assert plots._INK not in text
  assert 'prefers-color-scheme: dark' in text


def test_a_tower_that_is_measured_on_two_splits_has_finished_and_shows_its_ranking(tmp_path):
  workdir = made_run(tmp_path / 'run')
  for seed in (0, 1):
    directory = workdir / f'seed{seed}' / 'pretrain'
    (directory / 'test').mkdir()
    (directory / 'results.json').rename(directory / 'test' / 'results.json')
    with (directory / 'metrics.jsonl').open('a') as log:
      log.writelines(json.dumps({'step': s, 'eval/ndcg@10': s / 1e4}) + '\n' for s in (100, 200))
  text, page = read(workdir)
  assert 'Not there yet' not in text
  assert '(running)' not in text
  assert 'validation NDCG@10' in page.text


def test_text_of_the_run_is_escaped(tmp_path):
  text, page = read(made_run(tmp_path / 'run'))
  assert 'a <b>&' in page.text
  assert '<i>arm' in page.text
  assert '<b>&' not in text
  assert '<i>arm' not in text


def test_the_page_is_the_same_bytes_again(tmp_path):
  workdir = made_run(tmp_path / 'run')
  assert read(workdir)[0] == read(workdir)[0]


def test_an_unfinished_run_says_what_is_missing(tmp_path):
  workdir = made_run(tmp_path / 'run', finished=False)
  log = workdir / 'seed0' / 'pretrain' / 'metrics.jsonl'
  log.write_text(log.read_text() + '{"step": 220, "lo')  # killed while writing
  _, page = read(workdir)
  for line in (
    'seed0/pretrain/metrics.jsonl: 1 unreadable line left out',
    'seed0/pretrain: not finished, last logged step 200',
    'seed1/ranker_with_pinfm: not trained yet',
    'results.json: not written yet',
    'results.md: the evaluate stage has not run',
  ):
    assert line in page.text
  assert '200 (running)' in page.text


@pytest.mark.parametrize('name', ['experiment.json', 'results.json'])
@pytest.mark.parametrize('content', ['{"a": ', '[]', '\xff'])
def test_a_damaged_file_is_reported_and_the_rest_shown(tmp_path, name, content):
  workdir = made_run(tmp_path / 'run')
  (workdir / name).write_bytes(content.encode('latin-1'))
  text, page = read(workdir)
  assert name in page.text[page.text.index('Not there yet') :]
  assert 'Learning curves' in text


def test_an_evaluation_of_an_earlier_version_has_no_calibration(tmp_path):
  workdir = made_run(tmp_path / 'run')
  (workdir / 'reliability.json').unlink()
  text, page = read(workdir)
  assert '<h2>Calibration' not in text
  assert 'Not there yet' not in page.text


@pytest.mark.parametrize('content', ['{"label": "save"}', '{"label": "save", "arms": {"a": [1]}}', '[1]', '{"a'])
def test_damaged_calibration_curves_are_reported(tmp_path, content):
  workdir = made_run(tmp_path / 'run')
  (workdir / 'reliability.json').write_text(content)
  text, page = read(workdir)
  assert 'reliability.json' in page.text[page.text.index('Not there yet') :]
  assert '<h2>Calibration' not in text


@pytest.mark.parametrize('arms', [1, 2, 12])
def test_plots_keep_many_arms_apart(arms):
  names = [f'arm {i}' for i in range(arms)]
  svg = plots.intervals(
    'save', {n: {'<24h': plots.Interval(1, 0, 2), 'seen': plots.Interval(3, 2, 4)} for n in names}, '%'
  )
  assert all((f'>{name}<' in svg) == (arms > 1) for name in names)
  svg = plots.reliability('save', {name: [(0.1, 0.1), (0.5, 0.6)] for name in names})
  assert all((f'>{name}<' in svg) == (arms > 1) for name in names)


def test_a_run_that_has_only_begun(tmp_path):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  (workdir / 'experiment.json').write_text('{}')
  _, page = read(workdir)
  assert 'Not there yet' in page.text


def test_what_is_no_workdir_is_refused(tmp_path):
  with pytest.raises(UserError, match='no such directory'):
    write_report(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='neither experiment.json nor seed folders'):
    write_report(tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_markup_of_our_tables():
  text = markup.to_html('## Title\nA `word`\nand & more\n\n| | a\\|b |\n|---|---:|\n| x | **1** |\n\nEnd')
  assert re.sub(r'\n', '', text) == (
    '<h3>Title</h3><p>A <code>word</code> and &amp; more</p>'
    '<div class="scroll"><table><thead><tr><th scope="row"></th><th>a|b</th></tr></thead>'
    '<tbody><tr><th scope="row">x</th><td>**1**</td></tr></tbody></table></div><p>End</p>'
  )


def test_a_long_curve_is_thinned_to_its_averages():
  x, y = plots._thinned(range(1000), [float(i % 2) for i in range(1000)])
  assert len(x) == 400
  assert 0 < y.mean() < 1
  assert (x[0], x[-1]) == (0.5, 998.0)


def test_labels_are_text_and_no_formula():
  svg = plots.curves('price_$x$', {'a': ([1], [0.5]), 'b': ([1, 2], [0.5, 0.4])}, 'loss')
  assert 'price_$x$' in svg
