"""A client of `outrider serve`: answers as they grow, with the tail that may still change."""

from outrider.client.client import AsyncClient as AsyncClient, Client as Client
from outrider.client.sessions import Sessions as Sessions
from outrider.client.stream import Shown as Shown
from outrider.client.wire import ClientError as ClientError
