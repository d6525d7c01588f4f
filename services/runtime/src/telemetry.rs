//! Logs and traces: text or JSON lines on stderr, spans over OTLP when an endpoint is set.
//!
//! `SLOTMESH_LOG` filters (`info` by default, the syntax of tracing's `EnvFilter`);
//! `SLOTMESH_LOG_FORMAT=json` changes the format; `OTEL_EXPORTER_OTLP_ENDPOINT` turns span export
//! on. Keys, values and secrets never reach a log: no event of ours carries one.

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

/// Keeps the exporter alive; flushes it when dropped.
#[must_use = "spans are flushed when this is dropped"]
#[derive(Debug, Default)]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take() {
            // The process ends; an exporter that can't be reached must not change its exit code.
            let _ = provider.shutdown();
        }
    }
}

/// Installs the process-wide subscriber. A second call changes nothing, so tests may call it too.
pub fn init(service: &'static str) -> Telemetry {
    let filter = EnvFilter::try_from_env("SLOTMESH_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let format = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_target(true);
    let format = if std::env::var("SLOTMESH_LOG_FORMAT").as_deref() == Ok("json") {
        format.json().boxed()
    } else {
        format.with_ansi(false).boxed()
    };
    let provider = tracer_provider(service);
    let spans = provider
        .as_ref()
        .map(|p| tracing_opentelemetry::layer().with_tracer(p.tracer(service)));
    let _ = tracing_subscriber::registry()
        .with(filter)
        .with(format)
        .with(spans)
        .try_init();
    Telemetry { provider }
}

fn tracer_provider(service: &'static str) -> Option<SdkTracerProvider> {
    std::env::var_os("OTEL_EXPORTER_OTLP_ENDPOINT")?;
    // Needs a tokio runtime around it, as every process of ours has when it calls init.
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .build()
        .ok()?;
    Some(
        SdkTracerProvider::builder()
            .with_resource(Resource::builder().with_service_name(service).build())
            .with_batch_exporter(exporter)
            .build(),
    )
}
