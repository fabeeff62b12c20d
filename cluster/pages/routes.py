"""The rooms of the pages put together."""

from fastapi import APIRouter

from cluster.pages import compare, completions, job, jobs, live, query, replay, schedules, sessions, static, system

router = APIRouter()
for room in (jobs, job, replay, completions, compare, schedules, system, query, sessions, live, static):
    router.include_router(room.router)
