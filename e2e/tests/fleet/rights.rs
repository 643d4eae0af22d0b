//! What the chart's accounts may do, and what not.

use anyhow::{Result, ensure};
use herd_e2e::with_fleet;

#[test]
fn operator_and_gateway_may_do_what_they_need_and_no_more() -> Result<()> {
    with_fleet(|fleet| {
        let cases: [(&str, &[&str], &str); 15] = [
            ("herd-operator", &["create", "pods"], "yes"),
            ("herd-operator", &["patch", "llamapools.herd.dev", "--subresource=status"], "yes"),
            ("herd-operator", &["patch", "pods"], "no"),
            ("herd-operator", &["create", "pods", "--subresource=exec"], "no"),
            ("herd-operator", &["get", "secrets"], "no"),
            ("herd-operator", &["list", "nodes"], "yes"),
            ("herd-operator", &["watch", "nodes"], "no"),
            ("herd-operator", &["create", "podgroups.scheduling.k8s.io"], "yes"),
            ("herd-operator", &["update", "llamadeployments.herd.dev"], "no"),
            ("herd-gateway", &["watch", "endpointslices.discovery.k8s.io"], "yes"),
            ("herd-gateway", &["watch", "llamadeployments.herd.dev"], "yes"),
            ("herd-gateway", &["patch", "llamadeployments.herd.dev"], "no"),
            ("herd-gateway", &["patch", "services"], "no"),
            ("herd-gateway", &["list", "pods"], "no"),
            ("herd-gateway", &["get", "secrets"], "no"),
        ];
        for (account, what, expected) in cases {
            let account = format!("--as=system:serviceaccount:herd-system:{account}");
            let arguments = [&["auth", "can-i"], what, &[account.as_str(), "--all-namespaces"]].concat();
            let answer = fleet.kubectl().finish(&arguments, "")?;
            ensure!(answer.out.trim() == expected, "{arguments:?}: {answer:?}");
        }
        Ok(())
    })
}
