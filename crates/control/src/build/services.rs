//! Two Services a LlamaDeployment: the leaders that gateways find, and the names by which ranks find each other.

use std::collections::BTreeMap;

use herd_api::{labels, names, ports};
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::metadata;
use crate::ValidatedDeployment;

/// Headless, of the leaders that are ready; names the models they serve.
pub fn leaders_service(deployment: &ValidatedDeployment) -> Service {
    let mut service =
        headless(deployment, names::leaders_service(&deployment.name), labels::ENDPOINTS_LEADERS);
    let served = serde_json::Value::from(deployment.served_names.clone()).to_string();
    service.metadata.annotations = Some(BTreeMap::from([(labels::SERVED_NAMES.to_owned(), served)]));
    if let Some(spec) = &mut service.spec {
        let selector = spec.selector.get_or_insert_default();
        selector.insert(labels::RANK.to_owned(), "0".to_owned());
    }
    service
}

/// Headless, of every rank, ready or not: ranks have to find each other before they are.
pub fn ranks_service(deployment: &ValidatedDeployment) -> Service {
    let mut service = headless(deployment, names::ranks_service(&deployment.name), labels::ENDPOINTS_RANKS);
    if let Some(spec) = &mut service.spec {
        spec.publish_not_ready_addresses = Some(true);
    }
    service
}

fn headless(deployment: &ValidatedDeployment, name: String, endpoints: &str) -> Service {
    let mut of_service = labels::of_deployment(&deployment.name);
    of_service.insert(labels::ENDPOINTS.to_owned(), endpoints.to_owned());
    Service {
        metadata: metadata(&deployment.namespace, name, &deployment.owner, of_service),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            ports: Some(vec![ServicePort {
                name: Some(ports::GRPC_NAME.to_owned()),
                port: ports::GRPC,
                target_port: Some(IntOrString::String(ports::GRPC_NAME.to_owned())),
                protocol: Some("TCP".to_owned()),
                app_protocol: Some("kubernetes.io/h2c".to_owned()),
                ..ServicePort::default()
            }]),
            selector: Some(BTreeMap::from([(labels::DEPLOYMENT.to_owned(), deployment.name.clone())])),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}
