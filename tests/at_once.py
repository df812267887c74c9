"""A plugin (`-p tests.at_once`): a failure is printed when it happens, for runs that may be stopped
before pytest would print it."""

import pytest


class AtOnce:
    def __init__(self, terminal):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.terminal.write_line(f"\nFAILED {report.nodeid} ({report.when})")
            self.terminal.write_line(report.longreprtext)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if terminal := config.pluginmanager.get_plugin("terminalreporter"):  # no process of xdist's
        config.pluginmanager.register(AtOnce(terminal))
