"""What the Grafana dashboards show; generate_dashboards.py writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression, and the name of each of its series."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture."""

    title: str
    queries: tuple[Query, ...]
    description: str = ""
    unit: str = "short"
    kind: Literal["timeseries", "stat", "table"] = "timeseries"
    width: int = 8  # of 24
    height: int = 7
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class Variable:
    """What is chosen at the top of a dashboard, one or several."""

    name: str
    label: str
    query: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """One page."""

    name: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    panels: tuple[Panel, ...]


def _number(title: str, expr: str, *, unit: str = "short") -> Panel:
    return Panel(title=title, queries=(Query(expr),), unit=unit, kind="stat", width=4, height=4)


FLEET = Dashboard(
    name="fleet",
    title="fleet",
    description="All servers and jobs: who is there, who does what, and what is short.",
    variables=(),
    panels=(
        _number("teachers ready", "sum(kdmesh_teacher_ready)"),
        _number("rollout servers ready", "sum(kdmesh_rollout_ready)"),
        _number("jobs", "count(kdmesh_trainer_steps_wanted)"),
        _number("teachers' tokens", "sum(kdmesh_teacher:tokens:rate5m)", unit="cps"),
        _number("samplers' tokens", "sum(kdmesh_rollout:tokens:rate5m)", unit="cps"),
        _number("alerts", 'count(ALERTS{alertname=~"Kdmesh.+", alertstate="firing"}) or vector(0)'),
        Panel(
            title="tokens by teacher",
            queries=(Query("kdmesh_teacher:tokens:rate5m", "{{instance}}"),),
            unit="cps",
        ),
        Panel(
            title="tokens by job",
            queries=(Query("sum by (kdmesh_job) (rate(kdmesh_teacher_tokens_total[5m]))", "{{kdmesh_job}}"),),
            unit="cps",
            is_stacked=True,
        ),
        Panel(
            title="time that waiting tokens take",
            description="What waits, by the speed of the last batches.",
            queries=(Query("kdmesh_teacher:waiting:seconds", "{{instance}}"),),
            unit="s",
        ),
        Panel(
            title="engine busy",
            description="Part of the time that the teacher computes.",
            queries=(Query("kdmesh_teacher:engine_busy:ratio5m", "{{instance}}"),),
            unit="percentunit",
        ),
        Panel(
            title="slab in use",
            queries=(Query("kdmesh_teacher:slab_used:ratio", "{{instance}}"),),
            unit="percentunit",
        ),
        Panel(
            title="busiest teacher over the mean",
            description="1 is even. By the target's job: one release of the chart.",
            queries=(Query("kdmesh_teacher:tokens:imbalance5m", "{{job}}"),),
        ),
        Panel(
            title="jobs: part of the time that they wait",
            queries=(
                Query(
                    'sum by (kdmesh_job) (kdmesh_trainer:bound:ratio5m{by=~"teacher|sampling"})',
                    "{{kdmesh_job}}",
                ),
            ),
            unit="percentunit",
        ),
        Panel(
            title="requests refused, by what was short",
            queries=(
                Query("sum by (reason) (rate(kdmesh_teacher_job_refusals_total[5m]))", "teacher: {{reason}}"),
                Query("sum by (reason) (rate(kdmesh_rollout_job_refusals_total[5m]))", "rollout: {{reason}}"),
            ),
            unit="reqps",
        ),
        Panel(
            title="slots abandoned",
            description="Clients that were silent past their lease while they held rows.",
            queries=(Query("increase(kdmesh_teacher_slots_abandoned_total[5m])", "{{instance}}"),),
        ),
        Panel(
            title="models",
            queries=(Query("kdmesh_teacher_model_info or kdmesh_rollout_model_info"),),
            kind="table",
            width=12,
        ),
        Panel(
            title="certificates end in",
            queries=(
                Query("kdmesh_teacher_certificate_expires_timestamp_seconds - time()", "{{instance}}"),
                Query("kdmesh_rollout_certificate_expires_timestamp_seconds - time()", "{{instance}}"),
            ),
            unit="s",
            width=12,
        ),
    ),
)

_T = '{instance=~"$instance"}'

TEACHER = Dashboard(
    name="teacher",
    title="teacher",
    description="One teacher server or several: its queue, its engine, its slab, its doors, its cache.",
    variables=(Variable("instance", "Server", "label_values(kdmesh_teacher_slots, instance)"),),
    panels=(
        _number("ready", f"sum(kdmesh_teacher_ready{_T})"),
        _number("sessions", f"sum(kdmesh_teacher_sessions{_T})"),
        _number("version of the weights", f"max(kdmesh_teacher_weight_version{_T})"),
        _number("requests waiting", f"sum(kdmesh_teacher_waiting_requests{_T})"),
        _number("tokens per second", f"sum(kdmesh_teacher:tokens:rate5m{_T})", unit="cps"),
        _number("memory of the slab", f"sum(kdmesh_teacher_slab_bytes{_T})", unit="bytes"),
        Panel(
            title="tokens by job",
            queries=(Query(f"sum by (kdmesh_job) (rate(kdmesh_teacher_tokens_total{_T}[5m]))", "{{kdmesh_job}}"),),
            unit="cps",
            is_stacked=True,
        ),
        Panel(
            title="tokens waiting, by job",
            queries=(Query(f"sum by (kdmesh_job) (kdmesh_teacher_job_waiting_tokens{_T})", "{{kdmesh_job}}"),),
            is_stacked=True,
        ),
        Panel(
            title="tokens being computed, by job",
            queries=(Query(f"sum by (kdmesh_job) (kdmesh_teacher_job_tokens_in_flight{_T})", "{{kdmesh_job}}"),),
            is_stacked=True,
        ),
        Panel(
            title="wait until the prefill",
            queries=tuple(
                Query(
                    f"histogram_quantile({quantile}, sum by (le) (rate(kdmesh_teacher_queue_seconds_bucket{_T}[5m])))",
                    name,
                )
                for quantile, name in ((0.5, "median"), (0.99, "99 %"))
            ),
            unit="s",
        ),
        Panel(
            title="batches in the engine",
            queries=tuple(
                Query(
                    f"histogram_quantile({quantile}, sum by (le) (rate(kdmesh_teacher_engine_seconds_bucket{_T}[5m])))",
                    name,
                )
                for quantile, name in ((0.5, "median"), (0.99, "99 %"))
            ),
            unit="s",
        ),
        Panel(
            title="engine",
            description="Part of the time that it computes.",
            queries=(Query(f"kdmesh_teacher:engine_busy:ratio5m{_T}", "{{instance}} busy"),),
            unit="percentunit",
        ),
        Panel(
            title="slots by state",
            queries=(Query(f"sum by (state) (kdmesh_teacher_slots{_T})", "{{state}}"),),
            is_stacked=True,
        ),
        Panel(
            title="slab by job",
            queries=(Query(f"sum by (kdmesh_job) (kdmesh_teacher_job_slab_bytes{_T})", "{{kdmesh_job}}"),),
            unit="bytes",
            is_stacked=True,
        ),
        Panel(
            title="bytes by door",
            queries=(Query(f"sum by (door) (rate(kdmesh_teacher_bytes_total{_T}[5m]))", "{{door}}"),),
            unit="Bps",
            is_stacked=True,
        ),
        Panel(
            title="requests by what came of them",
            queries=(Query(f"sum by (outcome) (rate(kdmesh_teacher_requests_total{_T}[5m]))", "{{outcome}}"),),
            unit="reqps",
        ),
        Panel(
            title="refused, by job and what was short",
            queries=(
                Query(
                    f"sum by (kdmesh_job, reason) (rate(kdmesh_teacher_job_refusals_total{_T}[5m]))",
                    "{{kdmesh_job}}: {{reason}}",
                ),
            ),
            unit="reqps",
        ),
        Panel(
            title="sessions that ended badly, slots abandoned",
            queries=(
                Query(f"sum(increase(kdmesh_teacher_sessions_died_total{_T}[5m]))", "process died"),
                Query(f"sum(increase(kdmesh_teacher_leases_expired_total{_T}[5m]))", "lease ran out"),
                Query(f"sum(increase(kdmesh_teacher_slots_abandoned_total{_T}[5m]))", "slots abandoned"),
            ),
        ),
        Panel(
            title="sequences that the cache had",
            queries=(
                Query(
                    f"sum(rate(kdmesh_teacher_cache_hits_total{_T}[5m])) / "
                    f"(sum(rate(kdmesh_teacher_cache_hits_total{_T}[5m])) "
                    f"+ sum(rate(kdmesh_teacher_cache_misses_total{_T}[5m])) > 0)",
                    "part of all",
                ),
            ),
            unit="percentunit",
        ),
        Panel(
            title="cache",
            queries=(Query(f"sum by (tier) (kdmesh_teacher_cache_bytes{_T})", "{{tier}}"),),
            unit="bytes",
        ),
        Panel(
            title="asleep",
            description="1 where memory of the device is given back.",
            queries=(Query(f"max by (instance, tag) (kdmesh_teacher_asleep{_T})", "{{instance}} {{tag}}"),),
        ),
    ),
)

_J = '{kdmesh_job=~"$kdmesh_job"}'
_BY_JOB = "{{kdmesh_job}}"


def _figure(title: str, metric: str, *, unit: str = "short") -> Panel:
    queries = (Query(f"kdmesh_trainer_{metric}{_J}", _BY_JOB),)
    return Panel(title=title, queries=queries, unit=unit)


JOB = Dashboard(
    name="job",
    title="job",
    description="One job or several: how it learns, and what bounds its step.",
    variables=(Variable("kdmesh_job", "Job", "label_values(kdmesh_trainer_steps_wanted, kdmesh_job)"),),
    panels=(
        _number("steps done", f"sum(kdmesh_trainer_step{_J})"),
        _number(
            "of those wanted",
            f"sum(kdmesh_trainer_step{_J}) / sum(kdmesh_trainer_steps_wanted{_J})",
            unit="percentunit",
        ),
        _number("since the last step", f"max(time() - kdmesh_trainer_last_step_timestamp_seconds{_J})", unit="s"),
        _number("tokens per second", f"sum(kdmesh_trainer:tokens:rate5m{_J})", unit="cps"),
        _number(
            "time left",
            f"max((kdmesh_trainer_steps_wanted{_J} - kdmesh_trainer_step{_J}) "
            f"/ (rate(kdmesh_trainer_steps_total{_J}[15m]) > 0))",
            unit="s",
        ),
        _number("loss", f"avg(kdmesh_trainer_loss_nats_per_token{_J})"),
        Panel(
            title="what bounds the step",
            description="teacher: waiting for rows. sampling: waiting for samples. publish: sending weights. "
            "update: forward, backward and optimizer; when this is nearly all, the job is as fast as its GPUs.",
            queries=(Query(f"avg by (by) (kdmesh_trainer:bound:ratio5m{_J})", "{{by}}"),),
            unit="percentunit",
            width=16,
            is_stacked=True,
        ),
        Panel(
            title="duration of a step",
            queries=tuple(
                Query(
                    f"histogram_quantile({quantile}, "
                    f"sum by (le, kdmesh_job) (rate(kdmesh_trainer_step_seconds_bucket{_J}[5m])))",
                    f"{_BY_JOB} {name}",
                )
                for quantile, name in ((0.5, "median"), (0.95, "95 %"))
            ),
            unit="s",
        ),
        Panel(
            title="phases of the loop",
            description="Seconds in each phase per second.",
            queries=(Query(f"sum by (phase) (rate(kdmesh_trainer_phase_seconds_total{_J}[5m]))", "{{phase}}"),),
            is_stacked=True,
        ),
        Panel(
            title="wait in the teacher's queue, 99 %",
            description="As the teachers saw it.",
            queries=(
                Query(
                    "histogram_quantile(0.99, "
                    f"sum by (le, kdmesh_job) (rate(kdmesh_teacher_queue_seconds_bucket{_J}[5m])))",
                    _BY_JOB,
                ),
            ),
            unit="s",
        ),
        Panel(
            title="wait in the rollout servers' queue, 99 %",
            queries=(
                Query(
                    "histogram_quantile(0.99, "
                    f"sum by (le, kdmesh_job) (rate(kdmesh_rollout_queue_seconds_bucket{_J}[5m])))",
                    _BY_JOB,
                ),
            ),
            unit="s",
        ),
        Panel(
            title="doors of the rows",
            description="shm is the fastest; the log's `rows have a door` says why it is another.",
            queries=(Query(f"kdmesh_trainer_door{_J}", f"{_BY_JOB} {{{{door}}}}"),),
        ),
        Panel(
            title="wait for each of several teachers",
            queries=(
                Query(
                    f"sum by (kdmesh_job, teacher) (rate(kdmesh_trainer_teacher_wait_seconds_total{_J}[5m]))",
                    f"{_BY_JOB} {{{{teacher}}}}",
                ),
            ),
            unit="percentunit",
        ),
        _figure("busiest replica over the mean", "teacher_imbalance"),
        _figure("loss", "loss_nats_per_token"),
        _figure("divergence from the teacher", "divergence_nats_per_token"),
        _figure("same likeliest token as the teacher", "top1_agreement", unit="percentunit"),
        _figure("distance of compared layers", "layer_distance"),
        _figure("held-out KL(teacher || student)", "held_out_kl_nats_per_token"),
        _figure("held-out cross-entropy", "held_out_cross_entropy_nats_per_token"),
        _figure("answers to questions that are right", "questions_accuracy", unit="percentunit"),
        _figure("norm of the gradient", "gradient_norm"),
        _figure("learning rate", "learning_rate"),
        _figure("updates that samples are behind", "staleness_steps_max"),
        _figure("tokens of a response", "response_tokens_mean"),
        _figure("responses cut off", "cut_off_fraction", unit="percentunit"),
        _figure("entropy of the student", "student_entropy_nats"),
        _figure("turns of an episode", "episode_turns_mean"),
        _figure("tokens of episodes that the environment said", "environment_fraction", unit="percentunit"),
        Panel(
            title="episodes by why they ended",
            description="The environment ended them; or the most turns, a limit of length, or the chat template did.",
            queries=tuple(
                Query(f"kdmesh_trainer_ended_by_{end}_fraction{_J}", f"{_BY_JOB} {end}")
                for end in ("environment", "turns", "length", "template")
            ),
            unit="percentunit",
        ),
        _figure("samples that the judge found right", "right_fraction", unit="percentunit"),
        _figure("what the judge gave a sample, on average", "sample_weight_mean"),
        Panel(
            title="samples that the judge left out",
            description="Given weight 0, and so not trained on. Those that the judge failed on are among them.",
            queries=(Query(f"kdmesh_trainer_left_out_fraction{_J}", _BY_JOB),),
            unit="percentunit",
        ),
        _figure("samples that the judge failed on", "judge_errors"),
        Panel(
            title="samples by why they ended",
            queries=(Query(f"sum by (reason) (rate(kdmesh_rollout_samples_total{_J}[5m]))", "{{reason}}"),),
        ),
    ),
)

ALL = (FLEET, TEACHER, JOB)
