//! ModifyInstanceMinorVersion: which engine is meant, whether it may be, and the task that gives it to
//! an instance's nodes.
//!
//! Invariant: an instance has one upgrade at a time; what is refused is refused before anything is
//! fetched, in words that say what to do.

use prost::Message as _;
use slotmesh_proto::instance::v1 as api;
use slotmesh_task::{
    Spec, Task,
    admit::RefusalKind,
    schedule::Window,
    upgrade::{self, BAKE_MS, HOLD_MS, Method, Options, Planned, TASK_MS_MAX, UpgradePhase},
};
use slotmesh_topology::{
    Instance, InstanceState, Shard,
    artifact::{Artifact, Product, Version, parse_name, parse_reported},
    compatibility::{self, Engine, WayBack},
};
use tonic::Status;
use tracing::info;

use super::{ADMIT_TRIES, Instances, again, busy, new_task};
use crate::{
    clock,
    drive::write::encode_instance,
    grpc::{artifact::Artifacts, refuse, refused, token::Token},
    store::keys::Key,
};

/// What stands for the newest one that is listed.
const LATEST: &str = "latest_version";
/// Shards that come first where nothing else is said.
const CANARY_SHARDS: u32 = 1;

impl Instances {
    pub(super) async fn admit_upgrade(
        &self,
        request: api::ModifyInstanceMinorVersionRequest,
    ) -> Result<api::ModifyInstanceMinorVersionResponse, Status> {
        let body = api::ModifyInstanceMinorVersionRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let body = body.encode_to_vec();
        let token = Token::of(&request.client_token, "ModifyInstanceMinorVersion", &body)?;
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            if let Some(earlier) = self.earlier(&token).await? {
                return Ok(api::ModifyInstanceMinorVersionResponse {
                    task_id: earlier.task.to_string(),
                    plan: None,
                });
            }
            let (instance, revision) = self.instance(&request.instance_id)?;
            let (planned, plan) = self.plan_upgrade(&instance, &request).await?;
            if request.plan_only || planned.nothing_to_do {
                return Ok(api::ModifyInstanceMinorVersionResponse {
                    task_id: String::new(),
                    plan: Some(plan),
                });
            }
            again::check_alone(&self.context, &instance.id, again::is_upgrade)?;
            let key = Key::Instance {
                instance: instance.id.as_str(),
            }
            .to_string();
            // Written as it is: of two upgrades admitted at the same time one has to look again.
            let txn = term
                .txn()
                .unchanged(key.clone(), revision)
                .put(key, encode_instance(&instance));
            let task = Task {
                not_before_ms: begins_ms(&planned, &instance),
                ..new_task(&instance.id, Spec::Upgrade(planned.upgrade), TASK_MS_MAX)
            };
            if let Some(done) = self.admit(txn, &task, &token, "").await? {
                info!(task = %done.task, instance = %instance.id, engine = plan.engine, "upgrade admitted");
                return Ok(api::ModifyInstanceMinorVersionResponse {
                    task_id: done.task.to_string(),
                    plan: Some(plan),
                });
            }
        }
        Err(busy())
    }

    async fn plan_upgrade(
        &self,
        instance: &Instance,
        request: &api::ModifyInstanceMinorVersionRequest,
    ) -> Result<(Planned, api::UpgradePlan), Status> {
        if instance.state != InstanceState::Running {
            return Err(refuse(
                RefusalKind::Precondition,
                "INSTANCE_NOT_RUNNING",
                format!("instance {} is not running", instance.id),
            ));
        }
        let listed = Artifacts::new(self.context.clone()).list().await?;
        let shards = self.plain_shards(instance);
        let to = meant(&request.minor_version, self.product(&shards), &listed)?;
        let options = options(request, to);
        let planned = self.context.hub.read(|fleet| {
            let plan = upgrade::plan(instance, &shards, fleet, &options, clock::now_ms());
            plan.map(|planned| {
                let version = |node: &_| fleet.node(node).map(|n| n.version.clone());
                let shown = show(&planned, instance, &shards, |node| {
                    version(node).unwrap_or_default()
                });
                (planned, shown)
            })
        });
        planned.map_err(|r| refused(&r))
    }

    pub(super) fn plain_shards(&self, instance: &Instance) -> Vec<Shard> {
        let shards = self.context.mirror.read(|s| s.shards_of(&instance.id));
        let mut plain: Vec<Shard> = shards.into_iter().map(|s| s.value).collect();
        plain.sort_by_key(|s| s.index);
        plain
    }

    /// Whose engine the nodes run: that of the oldest one.
    fn product(&self, shards: &[Shard]) -> Option<Product> {
        self.context.hub.read(|fleet| {
            let members = shards.iter().flat_map(|s| &s.members);
            let engines = members
                .filter_map(|m| fleet.node(&m.node))
                .filter_map(|n| parse_reported(&n.version));
            engines.min_by_key(|(_, version)| *version).map(|(p, _)| p)
        })
    }

    /// What each listed engine would be to the instance, and whether the newest may be had.
    pub(super) async fn upgrades(
        &self,
        instance: &Instance,
        latest: Option<&str>,
    ) -> Result<(String, Vec<api::Upgrade>), Status> {
        let listed = Artifacts::new(self.context.clone()).list().await?;
        let shards = self.plain_shards(instance);
        let request = api::ModifyInstanceMinorVersionRequest::default();
        let refused = self.context.hub.read(|fleet| {
            let Some(to) = latest.and_then(parse_name) else {
                return "no version of its engine is listed (slotmesh artifact add)".to_owned();
            };
            let options = options(&request, to);
            match upgrade::plan(instance, &shards, fleet, &options, clock::now_ms()) {
                Err(refusal) => refusal.message,
                Ok(planned) if planned.nothing_to_do => "every node runs it already".to_owned(),
                Ok(_) => String::new(),
            }
        });
        let from: Vec<Engine> = self.context.hub.read(|fleet| {
            let members = shards.iter().flat_map(|s| &s.members);
            let mut engines: Vec<Engine> = members
                .filter_map(|m| fleet.node(&m.node))
                .filter_map(|n| parse_reported(&n.version))
                .collect();
            engines.sort_unstable();
            engines.dedup();
            engines
        });
        let others = listed.iter().filter(|a| a.product.is_engine());
        let others = others.filter(|a| from != [(a.product, a.version)]);
        Ok((refused, others.map(|a| possible(&from, a)).collect()))
    }
}

fn possible(from: &[Engine], artifact: &Artifact) -> api::Upgrade {
    let to = (artifact.product, artifact.version);
    let ways = from.iter().map(|from| compatibility::upgrade(*from, to));
    let (mut by_copy, mut refused) = (true, String::new());
    for way in ways {
        match way {
            Ok(way) => by_copy &= way == WayBack::ByCopy,
            Err(why) => refused = why.to_string(),
        }
    }
    api::Upgrade {
        engine: artifact.name(),
        way_back_by_copy: by_copy && refused.is_empty(),
        refused,
    }
}

/// The engine that is meant; it has to be listed.
#[allow(clippy::result_large_err)]
pub(super) fn meant(
    text: &str,
    product: Option<Product>,
    listed: &[Artifact],
) -> Result<Engine, Status> {
    let unknown = || {
        refuse(
            RefusalKind::Unavailable,
            "VERSION_UNKNOWN",
            "no node has said which engine it runs: are the agents running? try again then",
        )
    };
    let engine = match text {
        "" | LATEST => {
            let product = product.ok_or_else(unknown)?;
            let of_product = listed.iter().filter(|a| a.product == product);
            let newest = of_product.map(|a| a.version).max();
            let Some(version) = newest else {
                return Err(refuse(
                    RefusalKind::NotFound,
                    "ARTIFACT_NOT_FOUND",
                    format!(
                        "no version of {} is listed; add one (slotmesh artifact add)",
                        product.name()
                    ),
                ));
            };
            (product, version)
        }
        text => match (parse_name(text), Version::parse(text)) {
            (Some(engine), _) => engine,
            (None, Some(version)) => (product.ok_or_else(unknown)?, version),
            (None, None) => {
                return Err(refuse(
                    RefusalKind::Invalid,
                    "VERSION_INVALID",
                    format!(
                        "{text:?} is no version such as 7.0.15, no artifact's name such as \
                         redis-7.0.15, and not {LATEST}"
                    ),
                ));
            }
        },
    };
    if listed.iter().any(|a| (a.product, a.version) == engine) {
        return Ok(engine);
    }
    let name = compatibility::name(engine);
    Err(refuse(
        RefusalKind::NotFound,
        "ARTIFACT_NOT_FOUND",
        format!(
            "{name} is not listed, so hosts can't fetch it; add it first (slotmesh artifact add)"
        ),
    ))
}

fn options(request: &api::ModifyInstanceMinorVersionRequest, to: Engine) -> Options {
    let bake_ms = request.bake_seconds.map(|s| u64::from(s) * 1_000);
    Options {
        to,
        bake_ms: bake_ms.unwrap_or(BAKE_MS),
        canary_shards: request.canary_shards.unwrap_or(CANARY_SHARDS),
        parallel_shards: request.parallel_shards,
        finalize_by_operator: request.finalize() == api::FinalizeBy::Operator,
        preserve_roles: request.preserve_roles,
        in_window: request.effective_time() == api::EffectiveTime::MaintainTime,
        allow_downtime: request.allow_downtime,
        automatic: false,
        method: match request.method() {
            api::UpgradeMethod::Unspecified | api::UpgradeMethod::Auto => Method::Auto,
            api::UpgradeMethod::InPlace => Method::InPlace,
            api::UpgradeMethod::CrossHost => Method::CrossHost,
        },
        max_hold_ms: request.max_hold_ms.unwrap_or(HOLD_MS),
    }
}

/// When its shards begin; 0: when every host has tried the engine.
fn begins_ms(planned: &Planned, instance: &Instance) -> u64 {
    let now_ms = clock::now_ms();
    let window = Window::read(&instance.maintenance_window).ok();
    let window = window.filter(|_| planned.upgrade.in_window);
    let opens_ms = window.map_or(0, |w| w.next_ms(now_ms));
    match opens_ms > now_ms {
        true => opens_ms,
        false => 0,
    }
}

fn show(
    planned: &Planned,
    instance: &Instance,
    shards: &[Shard],
    version: impl Fn(&slotmesh_topology::NodeId) -> String,
) -> api::UpgradePlan {
    let mut canaries = planned.upgrade.canary_shards;
    let parts = planned.upgrade.shards.iter().zip(shards);
    let shards = parts.map(|(part, shard)| {
        let mut members: Vec<_> = shard.members.iter().collect();
        members.sort_by_key(|m| m.node == shard.primary);
        let node = |m: &&slotmesh_topology::Member| api::NodePlan {
            node_id: m.node.to_string(),
            host_id: m.host.to_string(),
            version: version(&m.node),
            primary: m.node == shard.primary,
        };
        let canary = canaries > 0;
        canaries = canaries.saturating_sub(1);
        api::ShardPlan {
            shard_id: shard.id.to_string(),
            nodes: members.iter().map(node).collect(),
            canary,
            nothing_to_do: part.phase == UpgradePhase::Done,
            moved: part.moved,
        }
    });
    let begins_ms = begins_ms(planned, instance);
    api::UpgradePlan {
        engine: planned.upgrade.engine.clone(),
        shards: shards.collect(),
        remarks: planned.remarks.clone(),
        begins_at: clock::rfc3339(begins_ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::instance::listed;

    #[test]
    fn the_latest_is_the_newest_of_the_nodes_own_product_and_a_name_may_cross_over() {
        let catalogue = ["redis-7.0.15", "redis-8.2.3", "valkey-8.0.1"].map(listed);
        let of = |text, product| meant(text, product, &catalogue).map(compatibility::name);
        let redis = Some(Product::Redis);
        assert_eq!(of("", redis).unwrap(), "redis-8.2.3");
        assert_eq!(of(LATEST, Some(Product::Valkey)).unwrap(), "valkey-8.0.1");
        assert_eq!(of("7.0.15", redis).unwrap(), "redis-7.0.15");
        assert_eq!(of("valkey-8.0.1", redis).unwrap(), "valkey-8.0.1");
        for (text, product, code) in [
            ("7.0.9", redis, tonic::Code::NotFound),
            ("", None, tonic::Code::Unavailable),
            ("newest", redis, tonic::Code::InvalidArgument),
        ] {
            assert_eq!(of(text, product).unwrap_err().code(), code, "{text:?}");
        }
    }

    #[test]
    fn each_listed_engine_says_whether_it_may_be_had_and_whether_one_could_copy_back() {
        let from = [parse_reported("7.0.15").unwrap()];
        let of = |name| possible(&from, &listed(name));
        let patch = of("redis-7.0.16");
        assert!(patch.refused.is_empty() && patch.way_back_by_copy);
        let next = of("redis-8.2.3");
        assert!(next.refused.is_empty() && !next.way_back_by_copy);
        assert!(of("redis-6.2.14").refused.contains("lose the data"));
    }
}
