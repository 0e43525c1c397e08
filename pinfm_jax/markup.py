"""The little Markdown that this project writes itself (headings, paragraphs, tables), as HTML."""

import html
import re

_ALIGNED = re.compile(r'\|(\s*:?-+:?\s*\|)+')


def to_html(markdown: str) -> str:
  """Converts headings, paragraphs and pipe tables; everything else is shown as the text it is, escaped.

  Args:
    markdown: the text of a results.md.

  Returns:
    HTML without scripts, links or images.
  """
  blocks, lines = [], markdown.splitlines()
  while lines:
    line = lines.pop(0).strip()
    if not line:
      continue
    heading = re.fullmatch(r'(#{1,6})\s+(.*)', line)
    if heading:
      level = min(len(heading[1]) + 1, 6)  # the page has the only h1
      blocks.append(f'<h{level}>{_inline(heading[2])}</h{level}>')
      continue
    block = [line]
    same = '|' if line.startswith('|') else ''
    while lines and lines[0].strip() and lines[0].strip().startswith('|') == bool(same):
      if lines[0].startswith('#'):
        break
      block.append(lines.pop(0).strip())
    blocks.append(_table(block) if same else f'<p>{_inline(" ".join(block))}</p>')
  return '\n'.join(blocks)


def table(header: list[str], rows: list[list[str]]) -> str:
  """A table of plain text cells, escaped; the first column names the row."""

  def line(cells: list[str], tag: str) -> str:
    first, *rest = (_inline(cell) for cell in cells)
    return f'<tr><th scope="row">{first}</th>' + ''.join(f'<{tag}>{cell}</{tag}>' for cell in rest) + '</tr>'

  body = '\n'.join(line(row, 'td') for row in rows)
  return f'<div class="scroll"><table><thead>{line(header, "th")}</thead>\n<tbody>{body}</tbody></table></div>'


def _table(lines: list[str]) -> str:
  rows = [_cells(line) for line in lines if not _ALIGNED.fullmatch(line)]
  return table(rows[0], rows[1:]) if rows else ''


def _cells(line: str) -> list[str]:
  cells = re.split(r'(?<!\\)\|', line.removeprefix('|').removesuffix('|'))
  return [cell.strip().replace('\\|', '|') for cell in cells]


def _inline(text: str) -> str:
  return re.sub(r'`([^`]+)`', r'<code>\1</code>', html.escape(text))
