"""The paper's tables and figures: its settings and values as cells, run, and shown beside ours."""
