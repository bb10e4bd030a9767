variable "TAG" { default = "one" }
group "default" { targets = ["app"] }
target "app" {
  args = { A = "1", B = "1" }
  tags = ["app:${TAG}"]
  annotations = ["a=b"]
  cache-from = ["x"]
}
