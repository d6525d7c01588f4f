//! Metrics and readiness on a port of their own, so that a scrape never meets a client.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use slotmesh_runtime::metrics::{Metrics, MetricsError};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::core::Counters;
use crate::handover::Counts;
use crate::metrics::Published;
use crate::routing::Routing;
use crate::watch::Freshness;

/// What is observed.
#[derive(Clone, Debug)]
pub struct Observed {
    pub workers: Vec<Arc<Published>>,
    pub routing: Arc<Routing>,
    pub freshness: Arc<Freshness>,
    pub rejected: Arc<AtomicU64>,
    pub held_bytes: Arc<AtomicU64>,
    pub handovers: Arc<Counts>,
}

#[derive(Clone)]
struct Admin {
    metrics: Metrics,
    observed: Observed,
}

/// Serves until told to stop.
///
/// # Errors
/// Metrics cannot be set up, or the socket fails.
pub async fn serve(
    socket: TcpListener,
    observed: Observed,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let metrics = Metrics::new()?;
    register(&metrics, &observed);
    let router = Router::new()
        .route("/metrics", get(render))
        .route("/ready", get(ready))
        .route("/live", get(|| async { "live\n" }))
        .with_state(Admin { metrics, observed });
    axum::serve(socket, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await?;
    Ok(())
}

/// Why the admin port is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error("serve the admin port")]
    Io(#[from] std::io::Error),
}

async fn render(State(admin): State<Admin>) -> Result<String, (StatusCode, String)> {
    let failed = |error: MetricsError| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string());
    admin.metrics.render().map_err(failed)
}

/// Ready once every slot has a shard, until clients are to go elsewhere.
async fn ready(State(admin): State<Admin>) -> (StatusCode, &'static str) {
    if admin.observed.handovers.leaving.load(Ordering::Relaxed) > 0 {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "its clients are to go elsewhere\n",
        )
    } else if admin.observed.routing.load().is_complete() {
        (StatusCode::OK, "ready\n")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "no topology that serves every slot\n",
        )
    }
}

/// Observable instruments: they read the workers' integers when somebody asks.
fn register(metrics: &Metrics, observed: &Observed) {
    type Read = fn(&Counters) -> u64;
    let meter = metrics.meter("slotmesh-proxy");
    let counters: [(&str, &str, Read); 17] = [
        ("commands", "Commands of clients", |c| c.commands),
        ("errors", "Error replies of any cause", |c| c.errors),
        (
            "protocol_errors",
            "Clients whose bytes were no command",
            |c| c.protocol_errors,
        ),
        (
            "retries",
            "Requests sent again after a node did not execute them",
            |c| c.retries,
        ),
        (
            "outcome_unknown",
            "Requests whose outcome nobody knows",
            |c| c.outcome_unknown,
        ),
        (
            "unconfirmed",
            "Durable writes that too few replicas confirmed in time",
            |c| c.unconfirmed,
        ),
        ("hold_overdue", "Requests held for too long", |c| {
            c.hold_overdue
        }),
        (
            "overtaken",
            "Requests not repeated because a later one had run",
            |c| c.overtaken,
        ),
        ("held_requests", "Requests that waited in a hold", |c| {
            c.held_requests
        }),
        ("closed_backlog", "Clients closed for not reading", |c| {
            c.closed_backlog
        }),
        ("node_losses", "Lost or failed connections to nodes", |c| {
            c.node_losses
        }),
        (
            "closed_subscribers",
            "Clients closed because they did not read their messages",
            |c| c.closed_subscribers,
        ),
        (
            "subscriber_lines_lost",
            "Lost connections for messages of nodes",
            |c| c.subscriber_lines_lost,
        ),
        (
            "subscriber_moves_forced",
            "Changes of a primary that messages could not follow to their end",
            |c| c.subscriber_moves_forced,
        ),
        (
            "departures_told",
            "Clients that asked for it and were told where to go",
            |c| c.departures_told,
        ),
        (
            "departed",
            "Clients closed between two requests, to go elsewhere",
            |c| c.departed,
        ),
        (
            "departed_late",
            "Clients closed because they had not gone elsewhere in time",
            |c| c.departed_late,
        ),
    ];
    for (name, help, read) in counters {
        let workers = observed.workers.clone();
        meter
            .u64_observable_counter(format!("slotmesh.proxy.{name}"))
            .with_description(help)
            .with_callback(move |seen| {
                seen.observe(workers.iter().map(|w| read(&w.load())).sum(), &[]);
            })
            .build();
    }
    let rejected = Arc::clone(&observed.rejected);
    meter
        .u64_observable_counter("slotmesh.proxy.rejected_clients")
        .with_description("Clients above the bound")
        .with_callback(move |seen| seen.observe(rejected.load(Ordering::Relaxed), &[]))
        .build();
    let workers = observed.workers.clone();
    meter
        .u64_observable_gauge("slotmesh.proxy.clients")
        .with_description("Connected clients")
        .with_callback(move |seen| seen.observe(workers.iter().map(|w| w.clients()).sum(), &[]))
        .build();
    let workers = observed.workers.clone();
    meter
        .f64_observable_gauge("slotmesh.proxy.held_max_seconds")
        .with_description("Longest hold of a request so far")
        .with_callback(move |seen| {
            let max_us = workers.iter().map(|w| w.load().held_max_us).max();
            seen.observe(max_us.unwrap_or(0) as f64 / 1e6, &[]);
        })
        .build();
    let held_bytes = Arc::clone(&observed.held_bytes);
    meter
        .u64_observable_gauge("slotmesh.proxy.held_bytes")
        .with_description("Bytes of requests that are held now")
        .with_callback(move |seen| seen.observe(held_bytes.load(Ordering::Relaxed), &[]))
        .build();
    let freshness = Arc::clone(&observed.freshness);
    meter
        .f64_observable_gauge("slotmesh.proxy.topology_staleness_seconds")
        .with_description("Time since a controller was last heard")
        .with_callback(move |seen| seen.observe(freshness.staleness().as_secs_f64(), &[]))
        .build();
    register_handovers(metrics, &observed.handovers);
}

fn register_handovers(metrics: &Metrics, counts: &Arc<Counts>) {
    let meter = metrics.meter("slotmesh-proxy");
    type Read = fn(&Counts) -> &AtomicU64;
    let counters: [(&str, &str, Read); 4] = [
        (
            "handed_over_clients",
            "Clients that another process took",
            |c| &c.given,
        ),
        (
            "taken_over_clients",
            "Clients taken from another process",
            |c| &c.taken,
        ),
        (
            "handover_returned_clients",
            "Clients that another process did not take when asked to",
            |c| &c.returned,
        ),
        ("handover_failures", "Hand-overs that ended early", |c| {
            &c.failed
        }),
    ];
    for (name, help, read) in counters {
        let counts = Arc::clone(counts);
        meter
            .u64_observable_counter(format!("slotmesh.proxy.{name}"))
            .with_description(help)
            .with_callback(move |seen| seen.observe(read(&counts).load(Ordering::Relaxed), &[]))
            .build();
    }
    let gauges: [(&str, &str, Read); 3] = [
        (
            "leaving",
            "1: clients are to go elsewhere, and no more are accepted",
            |c| &c.leaving,
        ),
        (
            "handover_left_clients",
            "Clients that could not be handed over yet",
            |c| &c.left,
        ),
        (
            "handover_stopped_max_us",
            "Longest time that a client was stopped in the last hand-over, in microseconds",
            |c| &c.stopped_max_us,
        ),
    ];
    for (name, help, read) in gauges {
        let counts = Arc::clone(counts);
        meter
            .u64_observable_gauge(format!("slotmesh.proxy.{name}"))
            .with_description(help)
            .with_callback(move |seen| seen.observe(read(&counts).load(Ordering::Relaxed), &[]))
            .build();
    }
}
