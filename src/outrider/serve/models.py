"""/v1/models: the one model that is served here."""

from typing import Any

from fastapi import APIRouter, Depends

from outrider.serve.base import Server, server, tenant

router = APIRouter(tags=["models"], dependencies=[Depends(tenant)])


@router.get("/v1/models")
async def list_models(server: Server = Depends(server)) -> dict[str, Any]:
    return {"object": "list", "data": [_card(server)]}


@router.get("/v1/models/{model:path}")
async def get_model(model: str, server: Server = Depends(server)) -> dict[str, Any]:
    server.check_model(model)
    return _card(server)


def _card(server: Server) -> dict[str, Any]:
    return {
        "id": server.model_name,
        "object": "model",
        "created": server.started,
        "owned_by": "outrider",
        "root": server.llm.engine.spec.name,
        "parent": None,
        "max_model_len": server.llm.engine.max_model_len,
    }
