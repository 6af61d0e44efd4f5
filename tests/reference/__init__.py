"""Slow, literal transcriptions of the published algorithms and brute force. Imported by tests and benchmarks only."""
