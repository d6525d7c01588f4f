//! What kind of upgrade is measured, and of what.
//!
//! Invariant: without flags it is one that everybody does: in place, of shards with a replica.

use slotmesh_harness::MeshOptions;
use slotmesh_proto::instance::v1::UpgradeMethod;

use crate::args::LoadArgs;

/// Flags of `slotmesh-bench upgrade`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Engine that the meshes are made of, as `slotmesh up --engine`.
    #[arg(long, default_value = "redis-7.0", value_name = "NAME|PATH")]
    pub from: String,
    /// Engine that they get.
    #[arg(long, default_value = "redis-8.2", value_name = "NAME|PATH")]
    pub to: String,
    /// Kinds of instances; may be repeated; standard and cluster by default.
    #[arg(long, value_enum)]
    pub architecture: Vec<Architecture>,
    /// Meshes of each kind, one after the other.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub count: u32,
    /// Shards of a cluster.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub shards: u32,
    /// Replicas of each shard.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=5))]
    pub replicas: u32,
    /// Keys that are there before.
    #[arg(long, default_value_t = 20_000, value_name = "N")]
    pub keys: u32,
    /// How long the old primary follows with the old engine, in seconds.
    #[arg(long, default_value_t = 2, value_name = "SECONDS")]
    pub bake: u32,
    /// Shards that are upgraded at a time, once the first one is done.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub parallel: u32,
    /// Goes back in the bake of a first upgrade, before the one that stays.
    #[arg(long)]
    pub back: bool,
    /// Where the next engine runs; all nodes of cross-host go to hosts that are added for them.
    #[arg(long, value_enum, default_value = "auto")]
    pub method: Method,
    /// The primaries of before are primaries again in the end.
    #[arg(long)]
    pub preserve_roles: bool,
    #[command(flatten)]
    pub load: LoadArgs,
}

/// What kind of instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Architecture {
    Standard,
    Cluster,
    /// One shard with one node, which a new one takes the place of.
    Standalone,
}

impl Architecture {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Cluster => "cluster",
            Self::Standalone => "standalone",
        }
    }

    /// What the mesh is started with.
    pub(super) fn options(self, args: &Args) -> MeshOptions {
        let (name, replicas) = match self {
            Self::Standalone => (Self::Standard.name(), 0),
            _ => (self.name(), args.replicas),
        };
        MeshOptions {
            architecture: Some(name.to_owned()),
            shards: (self == Self::Cluster).then_some(args.shards),
            replicas: Some(replicas),
            engine: Some(args.from.clone()),
            ..MeshOptions::default()
        }
    }
}

/// Where the next engine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Method {
    /// In place, and in a new node where there is only one.
    Auto,
    InPlace,
    /// In new nodes on other hosts.
    CrossHost,
}

impl Method {
    pub(super) fn of_request(self) -> UpgradeMethod {
        match self {
            Self::Auto => UpgradeMethod::Auto,
            Self::InPlace => UpgradeMethod::InPlace,
            Self::CrossHost => UpgradeMethod::CrossHost,
        }
    }
}
