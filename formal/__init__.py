"""Models of dirtylog's protocols, checked exhaustively with Spin: right orders hold, wrong ones are refuted."""
