//! UpgradeProxy and RestartProxy: which proxies are meant, which program, and the task that gives it to
//! them.
//!
//! Invariant: an instance has one change of proxies at a time; what is refused is refused before
//! anything is written, in words that say what to do.

use prost::Message as _;
use slotmesh_proto::{instance::v1 as api, task::v1 as task_api};
use slotmesh_task::{
    Spec, Task,
    admit::RefusalKind,
    proxies::{self, BAKE_MS, DRAIN_MS, Options, Planned, ProxyPhase, Rebuild},
};
use slotmesh_topology::{
    HostId,
    artifact::{Artifact, Product},
    compatibility,
};
use tonic::Status;
use tracing::info;

use super::{ADMIT_TRIES, Instances, again, busy, new_task, schedule::not_before, upgrade::meant};
use crate::{
    clock,
    drive::write::put_instance,
    grpc::{artifact::Artifacts, refuse, refused, token::Token},
};

/// A task's deadline: its phases have their own, and a pause takes as long as an operator does.
const TASK_MS_MAX: u64 = 60 * 24 * 60 * 60 * 1_000;

/// Both requests, once it is known which program is meant.
#[derive(Debug)]
struct Asked {
    instance_id: String,
    options: Options,
    schedule: task_api::Schedule,
    plan_only: bool,
    token: Token,
}

/// What became of a request.
pub(super) type Answer = (String, Option<api::ProxyPlan>);

impl Instances {
    pub(super) async fn admit_proxy_upgrade(
        &self,
        request: api::UpgradeProxyRequest,
    ) -> Result<Answer, Status> {
        let body = api::UpgradeProxyRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let body = body.encode_to_vec();
        let token = Token::of(&request.client_token, "UpgradeProxy", &body)?;
        let (mode, given) = (request.switch_time_mode(), request.schedule.clone());
        let schedule = schedule_of(mode, given);
        let listed = Artifacts::new(self.context.clone()).list().await?;
        // A request that is repeated is answered also when its version is not listed any more.
        let program = match token.earlier(&self.context).await? {
            Some(_) => String::new(),
            None => program(&request.version, &listed)?,
        };
        self.admit_proxies(Asked {
            options: Options {
                program: Some(program),
                proxies: request.proxy_instance_ids,
                bake_ms: bake_ms(request.bake_seconds),
                in_window: is_window(&schedule),
                rebuild: None,
                workers: 0,
            },
            instance_id: request.instance_id,
            schedule,
            plan_only: request.plan_only,
            token,
        })
        .await
    }

    pub(super) async fn admit_proxy_restart(
        &self,
        request: api::RestartProxyRequest,
    ) -> Result<Answer, Status> {
        let rebuild = rebuild(&request)?;
        let body = api::RestartProxyRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let body = body.encode_to_vec();
        let (mode, given) = (request.switch_time_mode(), request.schedule.clone());
        let schedule = schedule_of(mode, given);
        self.admit_proxies(Asked {
            token: Token::of(&request.client_token, "RestartProxy", &body)?,
            options: Options {
                program: None,
                proxies: request.proxy_instance_ids,
                bake_ms: bake_ms(request.bake_seconds),
                in_window: is_window(&schedule),
                rebuild,
                workers: request.workers,
            },
            instance_id: request.instance_id,
            schedule,
            plan_only: request.plan_only,
        })
        .await
    }

    async fn admit_proxies(&self, asked: Asked) -> Result<Answer, Status> {
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            if let Some(earlier) = self.earlier(&asked.token).await? {
                return Ok((earlier.task.to_string(), None));
            }
            let (instance, revision) = self.instance(&asked.instance_id)?;
            let candidates = self.candidates();
            let planned = self.context.hub.read(|fleet| {
                let now_ms = clock::now_ms();
                proxies::plan(&instance, fleet, &candidates, &asked.options, now_ms)
            });
            let planned = planned.map_err(|r| refused(&r))?;
            let not_before_ms = not_before(Some(&asked.schedule), &instance)?;
            let plan = show(&planned, not_before_ms);
            if asked.plan_only || planned.nothing_to_do {
                return Ok((String::new(), Some(plan)));
            }
            again::check_alone(&self.context, &instance.id, again::is_of_proxies)?;
            // Written as it is: of two that are admitted at the same time one has to look again.
            let txn = put_instance(term.txn(), revision, &instance);
            let task = Task {
                not_before_ms,
                ..new_task(&instance.id, Spec::Proxies(planned.changes), TASK_MS_MAX)
            };
            if let Some(done) = self.admit(txn, &task, &asked.token, "").await? {
                info!(task = %done.task, instance = %instance.id, program = plan.program, "change of proxies admitted");
                return Ok((done.task.to_string(), Some(plan)));
            }
        }
        Err(busy())
    }
}

/// The artifact that is meant; it has to be listed, and to be a proxy's.
#[allow(clippy::result_large_err)]
fn program(text: &str, listed: &[Artifact]) -> Result<String, Status> {
    let latest = || {
        let proxies = listed.iter().filter(|a| a.product == Product::Proxy);
        let newest = proxies.map(|a| (a.product, a.version)).max();
        newest.ok_or_else(|| {
            let why = "no version of proxy is listed; add one (slotmesh artifact add)";
            refuse(RefusalKind::NotFound, "ARTIFACT_NOT_FOUND", why)
        })
    };
    let (product, version) = meant(text, Some(Product::Proxy), latest, listed)?;
    if product == Product::Proxy {
        return Ok(compatibility::name((product, version)));
    }
    Err(refuse(
        RefusalKind::Invalid,
        "NOT_A_PROXY",
        format!(
            "{text} is an engine; proxies run an artifact such as proxy-0.2.0, and engines are \
             upgraded by ModifyInstanceMinorVersion (slotmesh upgrade)"
        ),
    ))
}

/// What is asked of a rebuild; `None`: a restart where it is.
#[allow(clippy::result_large_err)]
fn rebuild(request: &api::RestartProxyRequest) -> Result<Option<Rebuild>, Status> {
    if request.mode() == api::RestartMode::Rebuild {
        let host = Some(request.host_id.as_str()).filter(|host| !host.is_empty());
        let seconds = request.drain_seconds;
        return Ok(Some(Rebuild {
            host: host.map(HostId::from),
            drain_ms: seconds.map_or(DRAIN_MS, |s| u64::from(s) * 1_000),
        }));
    }
    if request.host_id.is_empty() && request.drain_seconds.is_none() {
        return Ok(None);
    }
    Err(refuse(
        RefusalKind::Invalid,
        "NOT_A_REBUILD",
        "host_id and drain_seconds are of a rebuild (RESTART_MODE_REBUILD, --rebuild); in place the \
         proxy stays where it is",
    ))
}

fn bake_ms(seconds: Option<u32>) -> u64 {
    seconds.map_or(BAKE_MS, |s| u64::from(s) * 1_000)
}

fn schedule_of(mode: api::EffectiveTime, given: Option<task_api::Schedule>) -> task_api::Schedule {
    let in_window = mode == api::EffectiveTime::MaintainTime;
    let when = task_api::schedule::When::InMaintenanceWindow(in_window);
    given.unwrap_or(task_api::Schedule { when: Some(when) })
}

fn is_window(schedule: &task_api::Schedule) -> bool {
    schedule.when == Some(task_api::schedule::When::InMaintenanceWindow(true))
}

fn show(planned: &Planned, not_before_ms: u64) -> api::ProxyPlan {
    let to_hosts = planned.to_hosts.iter().map(ToString::to_string);
    let to_hosts = to_hosts.chain(std::iter::repeat(String::new()));
    let step = |(part, to_host_id): (&proxies::Change, String)| api::ProxyStep {
        proxy_id: part.proxy.to_string(),
        host_id: part.host.to_string(),
        program: part.from_program.clone(),
        version: part.from_version.clone(),
        nothing_to_do: part.phase == ProxyPhase::Done,
        to_host_id,
    };
    api::ProxyPlan {
        program: planned.changes.program.clone(),
        proxies: planned
            .changes
            .proxies
            .iter()
            .zip(to_hosts)
            .map(step)
            .collect(),
        remarks: planned.remarks.clone(),
        begins_at: clock::rfc3339(not_before_ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::instance::listed;

    #[test]
    fn the_latest_is_the_newest_proxy_and_an_engine_is_refused() {
        let catalogue = ["redis-8.2.3", "proxy-0.2.0", "proxy-0.10.0"].map(listed);
        assert_eq!(program("", &catalogue).unwrap(), "proxy-0.10.0");
        assert_eq!(program("0.2.0", &catalogue).unwrap(), "proxy-0.2.0");
        assert_eq!(program("proxy-0.2.0", &catalogue).unwrap(), "proxy-0.2.0");
        for (text, code) in [
            ("redis-8.2.3", tonic::Code::InvalidArgument),
            ("0.3.0", tonic::Code::NotFound),
            ("newest", tonic::Code::InvalidArgument),
        ] {
            assert_eq!(
                program(text, &catalogue).unwrap_err().code(),
                code,
                "{text}"
            );
        }
        let none = program("", &catalogue[..1]).unwrap_err();
        assert_eq!(none.code(), tonic::Code::NotFound);
        assert!(none.message().contains("slotmesh artifact add"), "{none}");
    }

    #[test]
    fn a_schedule_wins_over_the_mode_and_no_mode_means_at_once() {
        let window = api::EffectiveTime::MaintainTime;
        assert!(is_window(&schedule_of(window, None)));
        assert!(!is_window(&schedule_of(
            api::EffectiveTime::Unspecified,
            None
        )));
        let now = task_api::Schedule {
            when: Some(task_api::schedule::When::Now(true)),
        };
        assert!(!is_window(&schedule_of(window, Some(now))));
    }
}
