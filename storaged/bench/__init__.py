"""``storaged bench``: fio on a source by each way that there is to it, side by side, and what the figures say."""
