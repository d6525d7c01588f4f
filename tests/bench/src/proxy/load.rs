//! Load from redis-benchmark: a client that nobody here wrote.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::process::Command;
use tokio::time::timeout;

use super::targets::Target;

/// Keys that are read and written. Few enough to be all there after filling, many enough for all shards.
const KEYS: u64 = 10_000;
/// Random writes for each key while filling: leaves out one key in e^12.
const FILL_FACTOR: u64 = 12;
/// Bytes of a value: small, as most are.
const VALUE_BYTES: u32 = 64;
/// Nothing that is worth measuring takes longer; a target that hangs must not hang the comparison.
const RUN_LIMIT: Duration = Duration::from_secs(300);

/// One kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cell {
    /// As redis-benchmark's `-t`.
    pub(crate) test: &'static str,
    pub(crate) pipeline: u32,
    pub(crate) clients: u32,
}

impl Cell {
    pub(crate) fn name(self) -> String {
        format!(
            "{} P{} c{}",
            self.test.to_uppercase(),
            self.pipeline,
            self.clients
        )
    }
}

/// What redis-benchmark says of one run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Load {
    pub(crate) requests_per_second: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
}

/// Writes every key once or more, so that all reads find something, whatever a target's hashing.
pub(crate) async fn fill(target: &Target) -> anyhow::Result<()> {
    let cell = Cell {
        test: "set",
        pipeline: 32,
        clients: 10,
    };
    run(target, cell, KEYS * FILL_FACTOR).await.map(|_| ())
}

pub(crate) async fn run(target: &Target, cell: Cell, requests: u64) -> anyhow::Result<Load> {
    let mut command = Command::new("redis-benchmark");
    command.args(["-h", &target.host, "-p", &target.port.to_string(), "--csv"]);
    command.args([
        "-t",
        cell.test,
        "-d",
        &VALUE_BYTES.to_string(),
        "-r",
        &KEYS.to_string(),
    ]);
    command.args(["-n", &requests.to_string(), "-c", &cell.clients.to_string()]);
    command.args(["-P", &cell.pipeline.to_string()]);
    if target.tls {
        command.args(["--tls", "--insecure"]);
    }
    command.stdin(Stdio::null()).kill_on_drop(true);
    let what = || format!("redis-benchmark of {} ({})", target.name, cell.name());
    let output = timeout(RUN_LIMIT, command.output())
        .await
        .with_context(|| format!("{} takes more than {RUN_LIMIT:?}", what()))?
        .context("run redis-benchmark (package redis-tools)")?;
    let (text, complaint) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    // It ends with 1 at the first error reply, so a result means that every request was served.
    let Some(load) = parse(&text).filter(|_| output.status.success()) else {
        bail!(
            "{}: {} {}{}",
            what(),
            output.status,
            text.trim(),
            complaint.trim()
        );
    };
    Ok(load)
}

/// Reads `"test","rps",…` and the line below it.
fn parse(csv: &str) -> Option<Load> {
    let mut lines = csv.lines().skip_while(|line| !line.starts_with("\"test\""));
    let columns = |line: &'_ str| -> Vec<String> {
        line.split(',')
            .map(|cell| cell.trim_matches('"').to_owned())
            .collect()
    };
    let (head, row) = (columns(lines.next()?), columns(lines.next()?));
    let value = |name: &str| -> Option<f64> {
        row.get(head.iter().position(|column| column == name)?)?
            .parse()
            .ok()
    };
    Some(Load {
        requests_per_second: value("rps")?,
        p50_ms: value("p50_latency_ms")?,
        p99_ms: value("p99_latency_ms")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_below_the_heading_is_read_by_its_columns() {
        let csv = "WARNING: Could not fetch server CONFIG\n\
            \"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\
            \"p95_latency_ms\",\"p99_latency_ms\",\"max_latency_ms\"\n\
            \"GET\",\"1250000.00\",\"0.490\",\"0.096\",\"0.551\",\"0.783\",\"0.975\",\"1.055\"\n";
        let load = Load {
            requests_per_second: 1_250_000.0,
            p50_ms: 0.551,
            p99_ms: 0.975,
        };
        assert_eq!(parse(csv), Some(load));
    }

    #[test]
    fn output_without_a_result_is_no_result() {
        assert_eq!(parse(""), None);
        assert_eq!(parse("Error from server: ERR x\n"), None);
        assert_eq!(parse("\"test\",\"rps\"\n"), None);
    }
}
