//! Metrics: OpenTelemetry instruments, read as Prometheus text from a process's admin port.
//!
//! Hot paths count in plain integers of their own; observable instruments read them on a scrape,
//! so that a scrape costs a command nothing.

use opentelemetry::metrics::{Meter, MeterProvider as _};
use opentelemetry_sdk::metrics::SdkMeterProvider;
use prometheus::{Encoder, Registry, TextEncoder};

/// One process's metrics.
#[derive(Debug, Clone)]
pub struct Metrics {
    provider: SdkMeterProvider,
    registry: Registry,
}

/// Why there are no metrics.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The exporter refused its settings.
    #[error("set up the metrics exporter: {0}")]
    Exporter(String),
    /// A scrape failed.
    #[error("encode metrics: {0}")]
    Encode(String),
}

impl Metrics {
    /// An empty set.
    ///
    /// # Errors
    /// When the exporter can't be built.
    pub fn new() -> Result<Self, MetricsError> {
        let registry = Registry::new();
        let exporter = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .scope_info_enabled(false)
            .build()
            .map_err(|e| MetricsError::Exporter(e.to_string()))?;
        let provider = SdkMeterProvider::builder().with_reader(exporter).build();
        Ok(Self { provider, registry })
    }

    /// The meter under which a component makes its instruments.
    #[must_use]
    pub fn meter(&self, name: &'static str) -> Meter {
        self.provider.meter(name)
    }

    /// All metrics in the Prometheus text format.
    ///
    /// # Errors
    /// When an instrument gives a value that the format can't hold.
    pub fn render(&self) -> Result<String, MetricsError> {
        let mut out = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut out)
            .map_err(|e| MetricsError::Encode(e.to_string()))?;
        String::from_utf8(out).map_err(|e| MetricsError::Encode(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_appears_under_its_prometheus_name() {
        let metrics = Metrics::new().unwrap();
        metrics
            .meter("proxy")
            .u64_counter("slotmesh.proxy.commands")
            .build()
            .add(3, &[]);
        let text = metrics.render().unwrap();
        assert!(text.contains("slotmesh_proxy_commands_total 3"), "{text}");
    }
}
