"""What every resource owes whoever closes it."""

from dirtylog.sources._resource import Resource


class Racing(Resource):
    """Closed by somebody else in the moment between the question and the answer."""

    def __init__(self):
        super().__init__()
        self.releases = 0
        self.flag = False
        self.rival = None

    @property
    def _closed(self):
        answer = self.flag
        rival, self.rival = self.rival, None
        if rival:
            rival()
        return answer

    @_closed.setter
    def _closed(self, value):
        self.flag = value

    def _release(self):
        self.releases += 1


def test_of_two_that_close_at_once_one_gives_back():
    resource = Racing()
    resource.rival = resource.close
    resource.close()
    assert (resource.releases, resource.closed) == (1, True)
    resource.close()
    assert resource.releases == 1
