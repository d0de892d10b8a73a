"""Datasets through an embedder: files in, Parquet files of vectors out.

A job is cut into parts, and each part is one file of the output. A job that was ended, however,
goes on where it stopped.
"""

from halimede.bulk.job import Shard
from halimede.bulk.manifest import BulkOptions, FileRecord, Manifest
from halimede.bulk.run import Done, run

__all__ = ["BulkOptions", "Done", "FileRecord", "Manifest", "Shard", "run"]
