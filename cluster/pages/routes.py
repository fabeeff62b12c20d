"""The rooms of the pages put together."""

from fastapi import APIRouter

from cluster.pages import completions, job, jobs, live, query, replay, sessions, static, system

router = APIRouter()
for room in (jobs, job, replay, completions, system, query, sessions, live, static):
    router.include_router(room.router)
