"""Tables of the papers, run again: one small configuration a row, cached runs, results beside the paper's numbers.

Reading order: config (files to runs), record (what outlasts a folder of runs), execute (one run), metrics, memory,
queue (many runs, several processes), table (results), page, plot, cost.
"""

from .config import ConfigError, Row, Table, load_table, tables
from .cost import Cost, estimate
from .execute import MissingDataError, execute
from .page import write_page
from .queue import Queue
from .record import Record, RecordError
from .table import collect, write_results

__all__ = [
    "ConfigError",
    "Cost",
    "MissingDataError",
    "Queue",
    "Record",
    "RecordError",
    "Row",
    "Table",
    "collect",
    "estimate",
    "execute",
    "load_table",
    "tables",
    "write_page",
    "write_results",
]
