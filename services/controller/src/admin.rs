//! Metrics and readiness on a port of their own, so that a scrape never meets a caller of the API.
//!
//! Invariant: a scrape reads copies in memory, never the store: a store in trouble can still be seen.

use axum::{Router, extract::State, http::StatusCode, routing::get};
use slotmesh_runtime::metrics::{Metrics, MetricsError};
use slotmesh_task::State as TaskState;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::grpc::Context;

/// Why the admin port is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The exporter refused its settings.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The socket failed.
    #[error("serve the admin port")]
    Io(#[from] std::io::Error),
}

#[derive(Clone)]
struct Admin {
    metrics: Metrics,
    context: Context,
}

/// Serves until told to stop.
///
/// # Errors
/// Metrics can't be set up, or the socket fails.
pub async fn serve(
    socket: TcpListener,
    context: Context,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let metrics = Metrics::new()?;
    register(&metrics, &context);
    let router = Router::new()
        .route("/metrics", get(render))
        .route("/ready", get(ready))
        .route("/live", get(|| async { "live\n" }))
        .with_state(Admin { metrics, context });
    axum::serve(socket, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await?;
    Ok(())
}

async fn render(State(admin): State<Admin>) -> Result<String, (StatusCode, String)> {
    let failed = |error: MetricsError| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string());
    admin.metrics.render().map_err(failed)
}

/// Ready while the store answers, leader or not.
async fn ready(State(admin): State<Admin>) -> (StatusCode, &'static str) {
    if *admin.context.in_reach.borrow() {
        (StatusCode::OK, "ready\n")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the store does not answer\n",
        )
    }
}

fn register(metrics: &Metrics, context: &Context) {
    type Read = fn(&Context) -> u64;
    let meter = metrics.meter("slotmesh-controller");
    let gauges: [(&str, &str, Read); 9] = [
        ("leading", "This controller leads", |c| {
            c.leading().is_ok().into()
        }),
        ("term", "Highest term that is known here", |c| {
            c.leadership.borrow().known_term()
        }),
        (
            "failover_braked",
            "So many hosts are silent that silence makes no failover; only the leader knows",
            |c| c.hub.doubts().numbers().is_braked.into(),
        ),
        ("hosts", "Hosts that the leader knows", |c| {
            c.hub.doubts().numbers().hosts as u64
        }),
        ("hosts_silent", "Known hosts without a lease", |c| {
            c.hub.doubts().numbers().silent as u64
        }),
        (
            "primaries_suspected",
            "Primaries that look lost and are not replaced",
            |c| c.hub.doubts().numbers().suspected as u64,
        ),
        ("tasks_open", "Tasks that have not ended", |c| {
            tasks(c, |state| !state.is_ended())
        }),
        (
            "tasks_need_operator",
            "Tasks that wait for an operator",
            |c| tasks(c, |state| state == TaskState::NeedsOperator),
        ),
        ("store_in_reach", "The store answers", |c| {
            (*c.in_reach.borrow()).into()
        }),
    ];
    for (name, help, read) in gauges {
        let context = context.clone();
        meter
            .u64_observable_gauge(format!("slotmesh.controller.{name}"))
            .with_description(help)
            .with_callback(move |seen| seen.observe(read(&context), &[]))
            .build();
    }
    let braked = context.hub.clone();
    meter
        .u64_observable_counter("slotmesh.controller.failover_brakes")
        .with_description("Times that silent hosts put the brake on failovers")
        .with_callback(move |seen| seen.observe(braked.doubts().numbers().brakes, &[]))
        .build();
}

fn tasks(context: &Context, is_counted: fn(TaskState) -> bool) -> u64 {
    context.mirror.read(|state| {
        let tasks = state.tasks.values();
        tasks.filter(|t| is_counted(t.value.state)).count() as u64
    })
}
