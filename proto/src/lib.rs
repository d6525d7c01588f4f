//! The contract between slotmesh processes: the code generated from `slotmesh/<noun>/v1/*.proto`.
//!
//! Nothing else lives here, but how messages with keys are shown and
//! dropped. What a field means is said in the `.proto` file; how it maps to the
//! model is in the `wire` module of the crate that owns the model.
#![allow(missing_debug_implementations, unreachable_pub)]
#![allow(clippy::all, clippy::pedantic)]
// Comments of .proto files are written for their readers, not for rustdoc.
#![allow(
    rustdoc::invalid_html_tags,
    rustdoc::broken_intra_doc_links,
    rustdoc::bare_urls
)]

/// Descriptors of every service and message, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/slotmesh.bin"));

macro_rules! package {
    ($noun:ident, $name:literal, $doc:literal) => {
        #[doc = $doc]
        pub mod $noun {
            #[allow(missing_docs)]
            pub mod v1 {
                tonic::include_proto!($name);
            }
        }
    };
}

mod redacted;

package!(
    agent,
    "slotmesh.agent.v1",
    "Controller and agent: assignments, reports, steps."
);
package!(
    artifact,
    "slotmesh.artifact.v1",
    "Programs that hosts may run."
);
package!(
    fleet,
    "slotmesh.fleet.v1",
    "What runs where: hosts and proxies."
);
package!(
    handover,
    "slotmesh.handover.v1",
    "What one proxy process tells another about a client."
);
package!(
    instance,
    "slotmesh.instance.v1",
    "Instances: create, delete, describe, switch over."
);
package!(
    peer,
    "slotmesh.peer.v1",
    "Between controllers: what a follower's agents and proxies say."
);
package!(
    store,
    "slotmesh.store.v1",
    "Formats of the records in the store."
);
package!(task, "slotmesh.task.v1", "Tasks: list, watch, cancel.");
package!(
    topology,
    "slotmesh.topology.v1",
    "The topology stream from controller to proxy."
);
