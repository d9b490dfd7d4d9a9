"""What a row may hold that a page, a table or a fence could stumble over."""

HOSTILE = "</script><img src=x onerror=alert(1)> | **b** `code` ```\n\n# head\n| a | b |\x1b[31m 你好，世界 &amp; $x$"

JUDGE = "/models/big</td><b>|`x`"
"""A judge's name that tries the same; it is a folder, too, as servers have it."""
