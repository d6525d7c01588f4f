//! `slotmesh-bench`: measures, prints, and exits with 1 when a promise was broken.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use slotmesh_bench::{
    calm, chaos, durable, failover, proxy, proxy_upgrade, split, switchover, upgrade,
};

/// Measures a mesh with foreign clients.
#[derive(Debug, Parser)]
#[command(name = "slotmesh-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Switchovers back and forth under load: what is lost, what clients notice.
    Switchover(switchover::Args),
    /// Engines exchanged under load, there and back: what is lost, what clients notice.
    Upgrade(upgrade::Args),
    /// A proxy with thousands of clients handed over again and again: what each kind of them notices.
    ProxyUpgrade(proxy_upgrade::Args),
    /// What a request costs in our proxy, beside a direct connection and twemproxy.
    Proxy(proxy::ProxyArgs),
    /// Faults against a mesh in network namespaces of its own: what clients were told must be so.
    Chaos(chaos::Args),
    /// A busy machine, a bad network and slow engines, for long: nothing may fail over.
    Calm(calm::Args),
    /// Primaries killed, frozen, cut off: how long writers wait, what other shards notice.
    Failover(failover::Args),
    /// Primaries cut off with clients: by the engines' own word, no two accept writes.
    Split(split::Args),
    /// What it costs that replicas must have a write before it is acknowledged.
    Durable(durable::Args),
    #[command(hide = true)]
    ChaosInsider(chaos::InsiderArgs),
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let kept = match Cli::parse().command {
        Command::Switchover(args) => Box::pin(switchover::main(args)).await,
        Command::Upgrade(args) => Box::pin(upgrade::main(args)).await,
        Command::ProxyUpgrade(args) => Box::pin(proxy_upgrade::main(args)).await,
        Command::Proxy(args) => Box::pin(proxy::run(args)).await,
        Command::Chaos(args) => Box::pin(chaos::main(args)).await,
        Command::Calm(args) => Box::pin(calm::main(args)).await,
        Command::Failover(args) => Box::pin(failover::main(args)).await,
        Command::Split(args) => Box::pin(split::main(args)).await,
        Command::Durable(args) => Box::pin(durable::main(args)).await,
        Command::ChaosInsider(args) => Box::pin(chaos::insider(args)).await,
    };
    Ok(if kept? {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
