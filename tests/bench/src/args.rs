//! Flags that several measurements share.

use std::time::Duration;

use crate::report::Output;

/// The load with books, and how its verdict is printed.
#[derive(Debug, Clone, clap::Args)]
pub struct LoadArgs {
    /// Clients, of five kinds in turn: plain, pipelined, script, transaction, reader.
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub clients: u32,
    /// Pause of a client between two requests, in microseconds.
    #[arg(long, default_value_t = 1_000, value_name = "US")]
    pub pace_us: u64,
    #[arg(long, value_enum, default_value = "text")]
    pub output: Output,
}

impl LoadArgs {
    pub(crate) fn pace(&self) -> Duration {
        Duration::from_micros(self.pace_us)
    }
}
