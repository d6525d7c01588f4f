//! Times that callers name, as milliseconds: now, a time, or an instance's maintenance window.

use prost::Message as _;
use slotmesh_proto::{instance::v1 as api, task::v1 as task_api};
use slotmesh_task::{
    admit::RefusalKind,
    schedule::{self, Window},
};
use slotmesh_topology::Instance;
use tonic::Status;
use tracing::info;

use super::{ADMIT_TRIES, Instances, busy, change::revision_of};
use crate::{
    clock,
    grpc::{refuse, refused, token::Token},
};

/// When a task may begin; 0: at once.
///
/// # Errors
/// When the time can't be read, or is too far ahead.
#[allow(clippy::result_large_err)]
pub(in crate::grpc) fn not_before(
    schedule: Option<&task_api::Schedule>,
    instance: &Instance,
) -> Result<u64, Status> {
    let now_ms = clock::now_ms();
    match schedule.and_then(|s| s.when.as_ref()) {
        None | Some(task_api::schedule::When::Now(_)) => Ok(0),
        Some(task_api::schedule::When::InMaintenanceWindow(false)) => Ok(0),
        Some(task_api::schedule::When::At(text)) => {
            let at_ms = clock::from_rfc3339(text).ok_or_else(|| {
                refuse(
                    RefusalKind::Invalid,
                    "TIME_INVALID",
                    format!("{text:?} is no time such as 2026-11-22T03:00:00Z"),
                )
            })?;
            schedule::at(at_ms, now_ms).map_err(|r| refused(&r))
        }
        Some(task_api::schedule::When::InMaintenanceWindow(true)) => {
            if instance.maintenance_window.is_empty() {
                return Ok(0);
            }
            let window = Window::read(&instance.maintenance_window).map_err(|r| refused(&r))?;
            let at_ms = window.next_ms(now_ms);
            Ok(if at_ms == now_ms { 0 } else { at_ms })
        }
    }
}

/// The instance's maintenance window is waited for.
pub(in crate::grpc) fn is_window(schedule: Option<&task_api::Schedule>) -> bool {
    let when = schedule.and_then(|s| s.when.as_ref());
    when == Some(&task_api::schedule::When::InMaintenanceWindow(true))
}

impl Instances {
    pub(super) async fn change_window(
        &self,
        request: api::ModifyInstanceMaintainTimeRequest,
    ) -> Result<u64, Status> {
        if !request.maintenance_window.is_empty() {
            Window::parse(&request.maintenance_window).map_err(|r| refused(&r))?;
        }
        let body = api::ModifyInstanceMaintainTimeRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let method = "ModifyInstanceMaintainTime";
        let token = Token::of(&request.client_token, method, &body.encode_to_vec())?;
        if let Some(earlier) = token.earlier(&self.context).await? {
            return Ok(revision_of(&earlier));
        }
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            let (instance, revision) = self.instance(&request.instance_id)?;
            if request.maintenance_window.is_empty() && instance.auto_upgrade.is_some() {
                return Err(refuse(
                    RefusalKind::Precondition,
                    "AUTO_UPGRADE_ON",
                    "patches are installed by themselves in the window: turn that off first \
                     (slotmesh instance auto-upgrade INSTANCE --level off)",
                ));
            }
            let next = Instance {
                maintenance_window: request.maintenance_window.clone(),
                ..instance.clone()
            };
            let replaced = self.replace(term, &instance, revision, &next, &token);
            if let Some(revision) = replaced.await? {
                info!(instance = %next.id, window = next.maintenance_window, "maintenance window changed");
                return Ok(revision);
            }
        }
        Err(busy())
    }
}
