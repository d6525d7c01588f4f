//! `slotmesh-judges`: a judge against given addresses, or against a mesh and a Redis of its own.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use slotmesh_harness::{Mesh, MeshOptions, RedisServer, engines};
use slotmesh_judges::{differential, isolation};

#[derive(Parser)]
#[command(about = "Tries to tell an instance from one big Redis")]
struct Flags {
    #[command(subcommand)]
    judge: Judge,
    /// HOST:PORT of the instance [default: a mesh of 3 shards of its own]
    #[arg(long, global = true)]
    ours: Option<String>,
    #[arg(long, global = true, default_value_t = 1)]
    seed: u64,
}

#[derive(Subcommand)]
enum Judge {
    /// The same random commands to the instance and to one Redis
    Differential {
        #[arg(long, default_value_t = 100_000)]
        cases: usize,
        /// HOST:PORT of one Redis [default: the redis-server on PATH]
        #[arg(long)]
        one: Option<String>,
    },
    /// Many clients, each against a model, while others die in every state
    Isolation {
        #[arg(long, default_value_t = 100)]
        clients: usize,
        /// Of each client
        #[arg(long, default_value_t = 10_000)]
        commands: usize,
        #[arg(long, default_value_t = 50)]
        misfits: usize,
    },
    /// Every way that bytes may arrive
    Framing {
        /// Gaps for each length of key
        #[arg(long, default_value_t = 2_000)]
        gaps: usize,
        #[arg(long, default_value_t = 200)]
        floods: usize,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    match judge(Flags::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("slotmesh-judges: {error:#}");
            ExitCode::from(2)
        }
    }
}

async fn judge(flags: Flags) -> anyhow::Result<bool> {
    let mut mesh = None;
    let ours = match flags.ours {
        Some(address) => address,
        None => {
            let options = MeshOptions {
                shards: Some(3),
                replicas: Some(0),
                proxies: Some(1),
                ..MeshOptions::default()
            };
            let started = mesh.insert(Mesh::start(&options).await?);
            started.contract.proxies[0].clone()
        }
    };
    match flags.judge {
        Judge::Differential { cases, one } => {
            let mut server = None;
            let one = match one {
                Some(address) => address,
                None => {
                    let arguments = ["--databases", "256"];
                    let started = RedisServer::start(&engines::find("")?, &arguments).await?;
                    server.insert(started).address.clone()
                }
            };
            let plan = differential::Plan {
                ours,
                one,
                seed: flags.seed,
                cases,
            };
            let outcome = tokio::task::spawn_blocking(move || differential::run(&plan)).await??;
            eprint!("{outcome}");
            Ok(outcome.is_fine())
        }
        Judge::Isolation {
            clients,
            commands,
            misfits,
        } => {
            let crowd = isolation::Crowd {
                addresses: vec![ours],
                seed: flags.seed,
                clients,
                commands,
                misfits,
            };
            let seen = tokio::task::spawn_blocking(move || isolation::run(&crowd)).await??;
            eprint!("{seen}");
            Ok(seen.wrong.is_empty())
        }
        Judge::Framing { gaps, floods } => {
            let framing = isolation::Framing {
                address: ours,
                seed: flags.seed,
                gaps,
                floods,
            };
            let tried = tokio::task::spawn_blocking(move || isolation::framing(&framing)).await??;
            eprint!("{tried}");
            Ok(true)
        }
    }
}
